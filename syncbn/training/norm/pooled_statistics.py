"""Pools the running statistics of per-device layers over the devices, for validation and checkpoints."""

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from syncbn.nn import statistics
from syncbn.nn.statistics import Moments
from syncbn.nn.torch_internals import BatchNormBase


class PoolRunningStatistics(pl.Callback):
    """Before each validation and at the end of each epoch, makes the running statistics of all ranks one: pooled.

    The pooled mean is the mean of the ranks' means. The pooled variance is the mean of their variances *plus the
    variance of their means*, which averaging the variances alone leaves out. For use with per-device statistics that
    DistributedDataParallel does not overwrite with rank 0's (``broadcast_buffers=False``).
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pool_running_statistics(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pool_running_statistics(pl_module)


@torch.no_grad()
def pool_running_statistics(model: nn.Module) -> None:
    """Makes ``running_mean`` and ``running_var`` of every batch norm those of the ranks' pooled batches, in place.

    Every rank counts the same, as every rank's running average has seen as many batches. One float64 all-reduce over
    the world; where no process group is initialised, nothing happens.
    """
    layers = [m for m in model.modules() if isinstance(m, BatchNormBase) and m.track_running_stats]
    running = [
        (m.running_mean, m.running_var) for m in layers if m.running_mean is not None and m.running_var is not None
    ]
    if not running or not dist.is_initialized():
        return
    one = torch.ones((), dtype=torch.float64, device=running[0][0].device)
    sums = [statistics.pack(Moments(one, mean, var)) for mean, var in running]
    message = torch.cat(sums)
    dist.all_reduce(message)
    for (mean, var), pooled in zip(running, message.split([len(s) for s in sums]), strict=True):
        moments = statistics.unpack(pooled)
        mean.copy_(moments.mean)
        var.copy_(moments.var)
