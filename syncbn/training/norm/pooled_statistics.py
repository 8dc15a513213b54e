"""Pools the running statistics of per-device batch norm over the ranks, for validation and checkpoints."""

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.nn import statistics
from syncbn.nn.kernels import running_statistics
from syncbn.nn.simulation import Simulated
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
    running = _running(model)
    for pair, moments in zip(running.values(), _over_ranks(list(running.values())), strict=False):
        pair[0].copy_(moments.mean)
        pair[1].copy_(moments.var)


@torch.no_grad()
def pooled_buffers(model: nn.Module, *, over_ranks: bool) -> dict[str, Tensor]:
    """The pooled running statistics by name, where ranks or simulated devices have their own; nothing is changed.

    Args:
        model: its layers keep their statistics.
        over_ranks: every rank has its own; the all-reduce of :func:`pool_running_statistics`.
    """
    running = _running(model)
    pooled = dict(zip(running, _over_ranks(list(running.values())), strict=False)) if over_ranks else {}
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Simulated))
    pooled |= {name: layer.pooled() for name, layer in layers if layer.rows is not None and name in running}
    return {
        f"{name}.{key}": value.to(own.dtype)
        for name, moments in pooled.items()
        for key, value, own in zip(
            ("running_mean", "running_var"), (moments.mean, moments.var), running[name], strict=True
        )
    }


def _running(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The running statistics of the layers that keep them, by the layer's name."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BatchNormBase) and m.track_running_stats}
    found = ((name, running_statistics.of_layer(layer)) for name, layer in layers.items())
    return {name: running for name, running in found if running is not None}


def _over_ranks(running: list[tuple[Tensor, Tensor]]) -> list[Moments]:
    """The pooled statistics of all ranks; empty without a process group."""
    if not running or not dist.is_initialized():
        return []
    one = torch.ones((), dtype=torch.float64, device=running[0][0].device)
    sums = [statistics.pack(Moments(one, mean, var)) for mean, var in running]
    message = torch.cat(sums)
    dist.all_reduce(message)
    return [statistics.unpack(pooled) for pooled in message.split([len(s) for s in sums])]
