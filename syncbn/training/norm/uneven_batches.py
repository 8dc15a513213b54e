"""Checks for ``data.remainder=uneven`` that the smaller last batch leaves no batch norm layer with a single sample."""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.nn.comm import groups
from syncbn.nn.modules import Synchronized
from syncbn.nn.torch_internals import BatchNormBase
from syncbn.training.data.loaders import TrainLoader
from syncbn.training.errors import SettingError


class RefuseSingleSamples(pl.Callback):
    """Raises in the first batch if the last batch of the epoch would end in torch's ValueError.

    torch raises it if a batch norm layer has one value per channel: one sample (in this rank's share, or in the group
    that the layer is synchronized over) with one position, as between linear layers. An empty share is not a problem:
    torch's layer then also leaves its running statistics unchanged.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, TrainLoader) or trainer.num_training_batches < len(loader):
            return
        shares = loader.sampler.shares(len(loader) - 1)
        if sum(shares) == loader.sampler.global_batch:
            return

        def check(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            one_position = inputs[0].shape[2:].numel() == 1
            if layer.training and one_position and _has_single_sample(layer, shares, trainer.global_rank):
                raise SettingError("data.remainder", "uneven", _hint(loader, shares, layer))

        layers = [layer for layer in pl_module.modules() if isinstance(layer, BatchNormBase)]
        self._hooks = [layer.register_forward_pre_hook(check) for layer in layers]

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    on_exception = on_train_batch_end


def _has_single_sample(layer: nn.Module, shares: list[int], rank: int) -> bool:
    """Whether the layer would normalize over a single sample if the ranks hold these numbers of samples."""
    if isinstance(layer, nn.SyncBatchNorm):
        return sum(shares) == 1
    if not isinstance(layer, Synchronized) or layer.ghost_batch is not None:
        return 1 in shares
    group = groups.resolve(layer.group)
    members = [rank] if group is None else dist.get_process_group_ranks(group)
    return sum(shares[member] for member in members) == 1


def _hint(loader: TrainLoader, shares: list[int], layer: nn.Module) -> str:
    sampler = loader.sampler
    single = "one sample on a rank" if sum(shares) > 1 else "one sample"
    return (
        f"the last batch of an epoch has {sum(shares)} of {sampler.samples} samples, and with {single} a "
        f"{type(layer).__name__} has one value per channel to normalize; use {_alternatives(loader, layer)}"
    )


def _alternatives(loader: TrainLoader, layer: nn.Module) -> str:
    """The settings that work: the nearest batch size whose last batch fits, and the other remainders."""
    sampler, settings = loader.sampler, ["data.remainder=drop", "data.remainder=pad"]
    ranks, now = sampler.num_replicas, sampler.global_batch // sampler.num_replicas
    near = sorted((size for size in range(2, 2 * now + 1) if size != now), key=lambda size: abs(size - now))
    fits = next((size for size in near if 1 not in _last_shares(sampler.samples, size * ranks, ranks)), None)
    if fits is not None:
        settings.insert(0, f"data.batch_size={fits}")
    return f"{', '.join(settings[:-1])} or {settings[-1]}"


def _last_shares(samples: int, global_batch: int, ranks: int) -> list[int]:
    """Number of samples of each rank in the last global batch."""
    rest = samples % global_batch or global_batch
    return [len(range(rank, rest, ranks)) for rank in range(ranks)]
