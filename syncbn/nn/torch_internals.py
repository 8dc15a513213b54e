"""The private parts of torch that syncbn uses; no other module uses one.

Each was read in the version ``TESTED``. Those of torch.distributed are in :mod:`syncbn.nn.comm.c10d`.
``tests/nn/test_torch_internals.py`` fails, with the name of the attribute, when a later torch has moved one.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.utils._pytree
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _python_dispatch

TESTED = "2.13.0"  # the newest torch that the tests have run with; the doctor reports a newer one

# The base classes of torch's layers (torch 2.13). torch exports only the subclasses for one, two and three dimensions,
# and isinstance with these would miss SyncBatchNorm, the lazy layers and third-party subclasses.
BatchNormBase = _BatchNorm
NormBase = _NormBase  # of batch norm and instance norm
ConvBase = _ConvNd
DropoutBase = _DropoutNd
InstanceNormBase = _InstanceNorm

# torch 2.13 has no public module for the functions on nested collections. torch.utils._python_dispatch is private, but
# torch's notes on extending torch use its TorchDispatchMode.
TorchDispatchMode = _python_dispatch.TorchDispatchMode
tree_leaves = torch.utils._pytree.tree_leaves
tree_map = torch.utils._pytree.tree_map

COMPILED = "_orig_mod"  # torch 2.13: the attribute of a compiled module that holds the original; in parameter names too


def is_in_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode is active on this thread.

    ``torch.utils._python_dispatch.is_in_torch_dispatch_mode``, torch 2.13. No public function reports the active modes.
    """
    return _python_dispatch.is_in_torch_dispatch_mode()


def without_dispatch_modes() -> AbstractContextManager[Any]:
    """Suspends all dispatch modes of this thread.

    ``torch.utils._python_dispatch._disable_current_modes``, torch 2.13. No public function suspends a mode that other
    code has entered.
    """
    context: AbstractContextManager[Any] = _python_dispatch._disable_current_modes()
    return context


def transforms_are_active() -> bool:
    """Whether a transform of ``torch.func`` runs.

    ``torch._C._are_functorch_transforms_active``, torch 2.13. torch.func has no public function that reports it.
    """
    return torch._C._are_functorch_transforms_active()


def forward_ad_is_active() -> bool:
    """Whether forward-mode differentiation runs, also outside torch.func.

    ``torch.autograd.forward_ad._current_level``, torch 2.13; it is -1 outside ``dual_level()``. The module has no
    public function that reports it.
    """
    return forward_ad._current_level >= 0


def is_batched_by_autograd(t: Tensor) -> bool:
    """Whether ``t`` holds several gradients, for ``is_grads_batched=True`` of ``torch.autograd.grad``.

    ``torch._C._functorch.is_legacy_batchedtensor``, torch 2.13. This mechanism differs from ``torch.func.vmap``, and no
    public function reports it.
    """
    return torch._C._functorch.is_legacy_batchedtensor(t)


def profiler_is_active() -> bool:
    """Whether torch's profiler records this process.

    ``torch.autograd._profiler_enabled``, torch 2.13. No public function reports it, and ``record_function`` takes 6 µs
    where nothing records it.
    """
    return torch.autograd._profiler_enabled()  # type: ignore[attr-defined]  # not exported by name


def backward_is_running() -> bool:
    """Whether this thread runs a backward pass.

    ``torch._C._current_graph_task_id``, torch 2.13; it is -1 outside a backward pass. No public function reports it.
    """
    return torch._C._current_graph_task_id() != -1


# Whether a tensor is one of zeros without memory, as forward-mode differentiation makes them: its data_ptr()
# is 0. ``Tensor._is_zerotensor``, torch 2.13; no public method reports it. It is asked of each tensor of each layer.
is_zero_tensor = Tensor._is_zerotensor


@contextmanager
def buffers_restored(module: nn.Module, others: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restores the buffers of ``module``, those that were replaced too, and the values of ``others``.

    ``nn.Module._buffers``, torch 2.13. ``named_buffers()`` leaves out a buffer that is None, and ``setattr`` may be
    overridden, so neither restores what was registered.
    """
    registered = [(each._buffers, dict(each._buffers)) for each in module.modules()]
    values = [(buffer, buffer.clone()) for buffer in (*module.buffers(), *others)]
    try:
        yield
    finally:
        for buffers, before in registered:
            buffers.update(before)
        for buffer, value in values:
            buffer.copy_(value)


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """The hooks that run before the module's forward pass.

    ``nn.Module._forward_pre_hooks``, torch 2.13. Hooks can be registered and removed publicly, not listed.
    """
    return list(module._forward_pre_hooks.values())


def dynamo_is_imported() -> bool:
    """Whether anything has imported the compiler, without which nothing is compiled.

    The module ``torch._dynamo``, torch 2.13. ``torch.compiler`` has no function that reports it, and its functions
    import the compiler, which takes seconds.
    """
    return "torch._dynamo" in sys.modules
