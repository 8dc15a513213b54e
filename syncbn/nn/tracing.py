"""Detects whether torch.compile, a transform of torch.func or a dispatch mode traces the operations on tensors."""

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor

from syncbn.nn import torch_internals


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation runs.

    Autograd functions need ``setup_context``, ``jvp`` and ``vmap`` there, which the one of the fused kernels lacks.
    Always False in code that ``torch.compile`` traces: the compiler traces through transforms itself.
    """
    return not torch.compiler.is_compiling() and _in_transform()


def _in_transform() -> bool:
    return torch_internals.transforms_are_active() or torch_internals.forward_ad_is_active()


def linearizes() -> bool:
    """Whether ``torch.func.linearize`` traces: it would use the result of an all-reduce before it has arrived."""
    return torch_internals.forward_ad_is_active() and proxy_tensor.get_proxy_mode() is not None


def batched_by_autograd(t: Tensor) -> bool:
    """Whether ``t`` holds several gradients (``is_grads_batched=True``), a mechanism other than ``torch.func.vmap``.

    Always False in code that ``torch.compile`` traces.
    """
    return not torch.compiler.is_compiling() and torch_internals.is_batched_by_autograd(t)


def unwatched() -> bool:
    """Whether nothing traces the operations: only then may a kernel of ours read and write memory by its address.

    A compiler, a dispatch mode or a transform sees torch's operations only, so a kernel that it cannot see would be
    missing from what it records.
    """
    return not (torch.compiler.is_compiling() or torch_internals.is_in_dispatch_mode() or _in_transform())
