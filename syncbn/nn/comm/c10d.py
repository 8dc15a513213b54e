"""Private parts of torch.distributed that the layer needs, as of torch 2.13. The layer reaches for them here only.

``tests/nn/comm/test_c10d.py`` fails when a later version of torch has moved one.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeGuard, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def default_store() -> Any:
    """The store of the default process group, which every rank of the world can read and write."""
    return distributed_c10d._get_default_store()


def timeout(group: dist.ProcessGroup) -> timedelta:
    """The time-out of ``group``: the one that init_process_group or new_group was given."""
    for device in group._device_types:
        backend = group._get_backend(device)
        backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL wraps it
        found = getattr(getattr(backend, "options", None), "_timeout", None)
        if isinstance(found, timedelta):
            return found
    return distributed_c10d.default_pg_timeout  # a backend without options, such as torch's fake one


def is_registered(group: dist.ProcessGroup | None) -> TypeGuard[dist.ProcessGroup]:
    """Whether torch still knows ``group``: it was made in this process, and neither it nor its world was destroyed."""
    return group in distributed_c10d._world.pg_map


def registered() -> list[dist.ProcessGroup]:
    """The process groups that this rank is in, oldest first."""
    return list(distributed_c10d._world.pg_map)


def active_join() -> Any:
    """The settings of the ``join()`` around the DistributedDataParallel whose forward pass this is, or None.

    They have ``enable``, ``throw_on_early_termination`` and ``is_first_joinable``.
    """
    module = DistributedDataParallel._active_ddp_module
    return None if module is None or not module._join_config.enable else module._join_config


def constant_in_graphs(function: AnyFunction) -> AnyFunction:
    """torch.compiler.assume_constant_result, which would import all of torch._dynamo: 2,000 modules."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
