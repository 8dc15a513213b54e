"""Running statistics under DistributedDataParallel: made equal once, and not broadcast before every forward pass."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from syncbn.nn.comm import c10d, groups
from syncbn.nn.modules import Synchronized

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@torch.no_grad()
def broadcast_buffers_once(module: AnyModule) -> AnyModule:
    """Makes the running statistics that the whole world shares what they are on rank 0, and tells DDP to leave them be.

    They move alike on all ranks by themselves. DistributedDataParallel broadcasts them before each forward pass all the
    same, for nothing, once they are equal (they are not where rank 0 alone loaded a checkpoint). Statistics of smaller
    groups, and all other buffers, are broadcast as before.

    ``model = DistributedDataParallel(broadcast_buffers_once(convert(model)))``. Collective over the world. Without a
    process group nothing happens.

    Args:
        module: what DistributedDataParallel will be given, on its final device or not.

    Returns:
        The same object.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return module
    shared = {
        f"{name}.{key}" if name else key: buffer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, Synchronized) and layer.ghost_batch is None
        if groups.size(layer.group) == dist.get_world_size()
        for key, buffer in layer.named_buffers(recurse=False)
        if key in STATISTICS  # a subclass may have buffers of its own
    }
    # As objects, because they may be on the CPU still where the process group is NCCL's.
    message = [[buffer.cpu() for buffer in shared.values()]]
    if shared:
        dist.broadcast_object_list(message, src=0)
    for buffer, values in zip(shared.values(), message[0], strict=True):
        buffer.copy_(values)
    c10d.set_ignored_by_ddp(module, [*(c10d.ignored_by_ddp(module) or []), *shared])
    return module
