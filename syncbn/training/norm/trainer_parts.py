"""``norm=``: one word for what the batch norm statistics are, and what each word does to a model and its training."""

import inspect
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from syncbn.training.norm.plugin import SyncBatchNormPlugin
from syncbn.training.norm.pooled_statistics import PoolRunningStatistics
from syncbn.training.norm.uneven_batches import RefuseLoneSamples


class Parts(NamedTuple):
    """What a norm needs of Lightning.

    Attributes:
        plugins: for the trainer.
        callbacks: for the trainer.
        ddp_arguments: what DistributedDataParallel is told about buffers.
    """

    plugins: list[Any]
    callbacks: list[pl.Callback]
    ddp_arguments: dict[str, Any]


def parts(norm: dict[str, Any]) -> Parts:
    """The parts of Lightning that ``norm`` needs."""
    if norm["name"] in ("none", "group_norm"):
        return Parts([], [], {})
    made = Parts([], [RefuseLoneSamples()], {})
    if norm["name"] == "sync":
        made.plugins.append(SyncBatchNormPlugin(norm["group"], norm["only"], norm["ghost_batch"]))
    if norm["name"] == "ghost":
        made.plugins.append(SyncBatchNormPlugin(1, norm["only"], norm["ghost_batch"]))
    if norm["name"] == "torch_sync":
        made.plugins.append(TorchSyncBatchNorm())
    if norm["name"] == "local_mean":
        made.callbacks.append(PoolRunningStatistics())
        # Each rank keeps running statistics of its own, or there would be nothing to pool.
        # torch 2.13 calls the keyword forward_sync_buffers.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        keyword = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        made.ddp_arguments[keyword] = False
    return made
