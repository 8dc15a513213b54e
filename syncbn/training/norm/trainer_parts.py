"""``norm=``: one word for what the batch norm statistics are, and what each word does to a model and its training."""

import inspect
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn import statistics
from syncbn.nn.conversion.convert import batch_norms
from syncbn.nn.statistics import Moments
from syncbn.training.config.schema import SettingError
from syncbn.training.norm.plugin import SyncBatchNormPlugin
from syncbn.training.norm.uneven_batches import RefuseLoneSamples


def prepare_model(model: nn.Module, norm: dict[str, Any]) -> None:
    """Rewrites the batch norm layers of ``model`` in place where ``norm`` takes them out; else leaves them alone.

    Raises:
        SettingError: ``norm=sync``, ``ghost`` or ``torch_sync`` finds no batch norm in this model, or none of the
            names in ``norm.only``.
    """
    if norm["name"] == "none":
        remove_batch_norm(model)
    elif norm["name"] == "group_norm":
        replace_by_group_norm(model, norm["num_groups"], norm["min_channels"])
    elif norm["name"] in ("sync", "ghost", "torch_sync") and not any(batch_norms(model, norm.get("only"))):
        names = ", ".join(name for name, _ in batch_norms(model))
        if norm.get("only") is None:
            wants = "cut into ghost batches" if norm["name"] == "ghost" else "synchronize"
            raise SettingError(f"norm={norm['name']}: this model has no batch norm to {wants}; use norm=local")
        raise SettingError(f"norm.only={norm['only']}: no batch norm layer is called so; there are {names or 'none'}")


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


def remove_batch_norm(model: nn.Module) -> None:
    """Batch norm becomes an identity, and the layer before it gets the bias that the norm had made superfluous.

    The layer before is the last convolution or linear layer that was registered before the norm, in the same parent or
    an earlier one, if it has no bias and as many outputs as the norm has channels.
    """
    before: nn.Module | None = None
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            if before is not None and before.bias is None and _outputs(before) == layer.num_features:
                zeros = before.weight.new_zeros(layer.num_features)
                before.bias = nn.Parameter(zeros)
        elif _outputs(layer) is not None:
            before = layer
    _replace(model, lambda norm: nn.Identity())


def replace_by_group_norm(model: nn.Module, num_groups: int = 32, min_channels: int = 16) -> None:
    """Batch norm becomes group norm (Wu & He 2018) with the same weight, bias and eps.

    Args:
        model: changed in place.
        num_groups: at most; a layer takes the largest number that divides its channels.
        min_channels: in a group, at least, unless a layer has fewer.
    """

    def group_norm(norm: _BatchNorm) -> nn.Module:
        channels = norm.num_features
        groups = max(
            n for n in range(1, num_groups + 1) if n == 1 or (channels % n == 0 and channels // n >= min_channels)
        )
        new = nn.GroupNorm(groups, channels, eps=norm.eps, affine=norm.affine)
        new.weight, new.bias = norm.weight, norm.bias
        return new.train(norm.training)

    _replace(model, group_norm)


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
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
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


def _outputs(layer: nn.Module) -> int | None:
    """How many channels a convolution or linear layer gives; None for any other."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd) else None


def _replace(model: nn.Module, make: Any) -> None:
    """Puts ``make(layer)`` in the place of every batch norm below ``model``; a shared layer stays shared."""
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm):
                if child not in made:
                    made[child] = make(child)
                setattr(parent, name, made[child])
