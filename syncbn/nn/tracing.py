"""Whether torch.compile, a transform of torch.func or a dispatch mode watches what becomes of tensors."""

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor

from syncbn.nn import torch_internals


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs, or forward-mode differentiation: plain autograd does not see these.

    What ``torch.compile`` traces is no matter of theirs.
    """
    return not torch.compiler.is_compiling() and _in_transform()


def _in_transform() -> bool:
    return torch_internals.transforms_are_active() or torch_internals.forward_ad_is_active()


def linearizes() -> bool:
    """Whether ``torch.func.linearize`` traces: it would use what an all-reduce gives before that is there."""
    return torch_internals.forward_ad_is_active() and proxy_tensor.get_proxy_mode() is not None


def batched_by_autograd(t: Tensor) -> bool:
    """Whether ``t`` represents several, for ``is_grads_batched=True``: another mechanism than ``torch.func.vmap``.

    Always False in code that ``torch.compile`` traces.
    """
    return not torch.compiler.is_compiling() and torch_internals.is_batched_by_autograd(t)


def unwatched() -> bool:
    """Whether nobody watches or traces what becomes of tensors: who looks on sees torch's operations alone."""
    return not (torch.compiler.is_compiling() or torch_internals.is_in_dispatch_mode() or _in_transform())
