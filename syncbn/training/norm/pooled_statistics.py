"""Pools the running statistics of per-device batch norm over the ranks, for validation and checkpoints."""

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from syncbn.nn import statistics
from syncbn.nn.kernels import running_statistics
from syncbn.nn.statistics import Moments
from syncbn.nn.torch_internals import BatchNormBase


class PoolRunningStatistics(pl.Callback):
    """Pools the running statistics of all ranks before each validation and at the end of each epoch.

    The pooled mean is the mean of the ranks' means. The pooled variance is the mean of their variances *plus the
    variance of their means*, which an average of the variances would leave out. It requires
    ``broadcast_buffers=False``, since DistributedDataParallel otherwise overwrites the statistics with those of rank 0.
    """

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pool_running_statistics(pl_module)

    on_train_epoch_end = on_validation_start


@torch.no_grad()
def pool_running_statistics(model: nn.Module) -> None:
    """Replace ``running_mean`` and ``running_var`` of every batch norm layer by the pooled ones of all ranks, in place.

    All ranks have the same weight, because their running averages are over equally many batches. It is one float64
    all-reduce over the world. Without a process group it does nothing.
    """
    layers = [m for m in model.modules() if isinstance(m, BatchNormBase) and m.track_running_stats]
    running = [found for found in map(running_statistics.of_layer, layers) if found is not None]
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
