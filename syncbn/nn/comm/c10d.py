"""The private parts of torch.distributed that syncbn uses; no other module uses one.

Each was read in torch 2.13 (``TESTED`` in :mod:`syncbn.nn.torch_internals`). ``tests/nn/comm/test_c10d.py`` fails when
a later torch has moved one.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol  # defines the operations of all_reduce_operations
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

# torch 2.13: the namespaces of the operators that are collectives.
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def default_store() -> Any:
    """The store of the default process group, which every rank of the world can read and write.

    ``_get_default_store``, torch 2.13. No public function returns the store that init_process_group made.
    """
    return distributed_c10d._get_default_store()


def timeout(group: dist.ProcessGroup) -> timedelta:
    """The time-out of ``group``: the one that init_process_group or new_group was given.

    ``_device_types`` and ``_get_backend`` of a ProcessGroup, ``_timeout`` of a backend's options, torch 2.13. No public
    function returns the time-out.
    """
    for device in group._device_types:
        backend = group._get_backend(device)
        backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
        found = getattr(getattr(backend, "options", None), "_timeout", None)
        if isinstance(found, timedelta):
            return found
    return distributed_c10d.default_pg_timeout  # a backend without options, such as torch's fake one


def cpu_backend(group: dist.ProcessGroup) -> str:
    """The name of the backend that ``group`` uses for tensors of the CPU; empty if it has none.

    ``_device_types`` and ``_get_backend`` of a ProcessGroup, torch 2.13. No public function has the backends by device.
    """
    cpu = torch.device("cpu")
    if cpu not in group._device_types:
        return ""
    backend = group._get_backend(cpu)
    name: str = getattr(backend, "wrapped_pg", backend).name()  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
    return name


def is_registered(group: dist.ProcessGroup | None) -> TypeGuard[dist.ProcessGroup]:
    """Whether torch still knows ``group``: it was made in this process, and neither it nor its world was destroyed.

    ``_world.pg_map``, torch 2.13. The public functions raise for an unknown group; none reports it.
    """
    return group in distributed_c10d._world.pg_map


def registered() -> list[dist.ProcessGroup]:
    """The process groups that this rank is in, oldest first.

    ``_world.pg_map``, torch 2.13. No public function lists the groups.
    """
    return list(distributed_c10d._world.pg_map)


def active_join() -> Any:
    """The settings of the ``join()`` around the DistributedDataParallel whose forward pass this is, or None.

    They have ``enable``, ``throw_on_early_termination`` and ``is_first_joinable``. ``_active_ddp_module`` and
    ``_join_config``, torch 2.13. Nothing public reports to a layer that it runs within ``join()``.
    """
    module = DistributedDataParallel._active_ddp_module
    return None if module is None or not module._join_config.enable else module._join_config


def constant_in_graphs(function: AnyFunction) -> AnyFunction:
    """torch.compiler.assume_constant_result, which would import all of torch._dynamo: 2,000 modules.

    ``_dynamo_marked_constant``, torch 2.13: the public decorator sets it and does nothing else.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def functional_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``x`` over the ranks of ``group``, as an operation that a compiler and a dispatch mode can see.

    ``torch.distributed._functional_collectives``, torch 2.13. ``dist.all_reduce`` changes its argument in place, which
    neither torch.compile nor selective checkpointing can replay.
    """
    total: Tensor = funcol.wait_tensor(funcol.all_reduce(x, "sum", group))
    return total


def all_reduce_operations() -> list[Any]:
    """The operations of :func:`functional_all_reduce`, for selective activation checkpointing.

    ``torch.ops._c10d_functional``, torch 2.13. The operations have no public name.
    """
    operations = torch.ops._c10d_functional
    return [operations.all_reduce.default, operations.wait_tensor.default]


def ignored_by_ddp(module: nn.Module) -> list[str] | None:
    """The names of the parameters and buffers that DistributedDataParallel leaves alone; None where none were set.

    ``_ddp_params_and_buffers_to_ignore``, torch 2.13. There is no public way to read or set them for single buffers.
    """
    found: list[str] | None = getattr(module, _IGNORED, None)
    return found


def set_ignored_by_ddp(module: nn.Module, names: list[str]) -> None:
    """Sets what :func:`ignored_by_ddp` returns.

    ``DistributedDataParallel._set_params_and_buffers_to_ignore_for_model``, torch 2.13. There is no public setter.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def restore_ignored_by_ddp(module: nn.Module, names: list[str] | None) -> None:
    """Undoes :func:`set_ignored_by_ddp`; ``names`` is what :func:`ignored_by_ddp` returned before it.

    ``_ddp_params_and_buffers_to_ignore``, torch 2.13. torch has no function that takes the names back.
    """
    if names is not None:
        setattr(module, _IGNORED, names)
    elif hasattr(module, _IGNORED):
        delattr(module, _IGNORED)
