"""Maps the setting ``norm=`` to the Lightning plugins, callbacks and DDP arguments that implement it."""

import inspect
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from syncbn.training.norm.plugin import SyncBatchNormPlugin
from syncbn.training.norm.pooled_statistics import PoolRunningStatistics
from syncbn.training.norm.shuffle_plugin import RefuseUnshuffled, ShufflePlugin
from syncbn.training.norm.uneven_batches import RefuseSingleSamples


class Parts(NamedTuple):
    """Arguments of the Trainer that a norm needs, and of DistributedDataParallel about buffers."""

    plugins: list[Any]
    callbacks: list[pl.Callback]
    ddp_arguments: dict[str, Any]


def parts(norm: dict[str, Any], seed: int = 0) -> Parts:
    """Return the arguments of the Trainer for the settings ``norm``; ``seed`` is that of the run."""
    if norm["name"] in ("none", "group_norm"):
        return Parts([], [], {})
    made = Parts([], [RefuseSingleSamples()], {})
    if norm["name"] in ("sync", "ghost"):
        group = norm["group"] if norm["name"] == "sync" else 1
        made.plugins.append(SyncBatchNormPlugin(group, norm["only"], norm["ghost_batch"]))
    if norm["name"] == "torch_sync":
        made.plugins.append(TorchSyncBatchNorm())
    if norm["name"] == "shuffle":
        made.plugins.append(plugin := ShufflePlugin(norm["part"], seed=seed))
        made.callbacks.append(RefuseUnshuffled(plugin))
    if norm["name"] == "local_mean":
        made.callbacks.append(PoolRunningStatistics())
        # DDP must not broadcast rank 0's running statistics: the ranks' own ones are pooled.
        # torch 2.13 calls the keyword forward_sync_buffers, earlier versions call it broadcast_buffers.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        keyword = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        made.ddp_arguments[keyword] = False
    return made
