"""Whether torch.compile, a transform of torch.func or a dispatch mode traces operations; suspends torch.compile."""

from typing import Any

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


_requests = 0
_stance: Any = None


def run_eagerly() -> None:
    """Runs compiled code eagerly, until :func:`run_as_before` has been called as often as this.

    For the time in which hooks are registered in a model: compiled code calls no hooks.
    """
    global _requests, _stance
    _requests += 1
    # set_stance would import torch._dynamo, which takes seconds; without it nothing is compiled.
    if _stance is None and torch_internals.dynamo_is_imported():
        _stance = torch.compiler.set_stance("force_eager")


def run_as_before() -> None:
    """Undoes one call of :func:`run_eagerly`."""
    global _requests, _stance
    _requests -= 1
    if not _requests and _stance is not None:
        _stance.__exit__(None, None, None)
        _stance = None
