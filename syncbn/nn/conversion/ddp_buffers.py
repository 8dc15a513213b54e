"""Broadcasts running statistics once, instead of before every forward pass of DistributedDataParallel."""

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
    """Broadcasts the running statistics that the world shares from rank 0, and excludes them from DDP's broadcasts.

    They move alike on all ranks, so once they are equal (they are not if rank 0 alone loaded a checkpoint) the
    broadcast of DistributedDataParallel before each forward pass is needless. Statistics of smaller groups, and all
    other buffers, are broadcast as before.

    ``model = DistributedDataParallel(broadcast_buffers_once(convert(model)))``. Collective over the world. Without a
    process group nothing happens.

    Args:
        module: the module for DistributedDataParallel, on its final device or not.

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
        if key in STATISTICS  # a subclass may have more buffers
    }
    # As objects, because the buffers may still be on the CPU, where NCCL cannot send tensors.
    values_of_rank_0 = [[buffer.cpu() for buffer in shared.values()]]
    if shared:
        dist.broadcast_object_list(values_of_rank_0, src=0)
    for buffer, values in zip(shared.values(), values_of_rank_0[0], strict=True):
        buffer.copy_(values)
    c10d.set_ignored_by_ddp(module, [*(c10d.ignored_by_ddp(module) or []), *shared])
    return module
