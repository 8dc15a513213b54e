"""Whether torch.compile, a transform of torch.func or a dispatch mode watches what becomes of tensors."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs, or forward-mode differentiation: plain autograd does not see these.

    What ``torch.compile`` traces is no matter of theirs.
    """
    return not torch.compiler.is_compiling() and _in_transform()


def _in_transform() -> bool:
    """Both attributes are private to torch (read in 2.13); nothing else asks them, and a test watches the answers."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def linearizes() -> bool:
    """Whether ``torch.func.linearize`` traces: it would use what an all-reduce gives before that is there."""
    return forward_ad._current_level >= 0 and proxy_tensor.get_proxy_mode() is not None


def batched_by_autograd(t: Tensor) -> bool:
    """Whether ``t`` represents several, for ``is_grads_batched=True``: another mechanism than ``torch.func.vmap``.

    The attribute is private to torch (read in 2.13). What ``torch.compile`` traces is no matter of its.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(t)


def unwatched() -> bool:
    """Whether nobody watches or traces what becomes of tensors: who looks on sees torch's operations alone."""
    return not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or _in_transform())
