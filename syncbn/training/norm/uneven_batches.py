"""The last global batch of an epoch, where it is smaller and ranks hold unequal shares of it."""

from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import Tensor, nn

from syncbn.nn.comm import groups
from syncbn.nn.modules import Synchronized
from syncbn.nn.torch_internals import BatchNormBase
from syncbn.training.data.loaders import TrainLoader
from syncbn.training.errors import SettingError


class RefuseLoneSamples(pl.Callback):
    """Refuses ``data.remainder=uneven`` in the first batch, where the last would end in torch's ValueError.

    That is where a batch norm layer would be left with one value per channel: one sample to normalize over (this
    rank's share, or that of the group it is synchronized over) and one position in it, as between linear layers. No
    sample at all is no trouble: torch's layer, too, leaves its running statistics alone then.
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
            if layer.training and inputs[0].shape[2:].numel() == 1 and _is_alone(layer, shares, trainer.global_rank):
                raise SettingError("data.remainder", "uneven", _hint(loader, shares, layer))

        layers = [layer for layer in pl_module.modules() if isinstance(layer, BatchNormBase)]
        self._hooks = [layer.register_forward_pre_hook(check) for layer in layers]

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self.on_train_batch_end()


def _is_alone(layer: nn.Module, shares: list[int], rank: int) -> bool:
    """Whether the layer normalizes a single sample, on some rank, where ranks hold these shares."""
    if isinstance(layer, nn.SyncBatchNorm):
        return sum(shares) == 1
    if not isinstance(layer, Synchronized) or layer.ghost_batch is not None:
        return 1 in shares
    group = groups.resolve(layer.group)
    members = [rank] if group is None else dist.get_process_group_ranks(group)
    return sum(shares[member] for member in members) == 1


def _hint(loader: TrainLoader, shares: list[int], layer: nn.Module) -> str:
    sampler = loader.sampler
    alone = "one sample on a rank" if sum(shares) > 1 else "one sample"
    return (
        f"the last batch of an epoch has {sum(shares)} of {sampler.samples} samples, and with {alone} a "
        f"{type(layer).__name__} has one value per channel to normalize; use {_what_works(loader, layer)}"
    )


def _what_works(loader: TrainLoader, layer: nn.Module) -> str:
    sampler, ways = loader.sampler, ["data.remainder=drop", "data.remainder=pad"]
    ranks, now = sampler.num_replicas, sampler.global_batch // sampler.num_replicas
    near = sorted((size for size in range(2, 2 * now + 1) if size != now), key=lambda size: abs(size - now))
    fits = next((size for size in near if 1 not in _last(sampler.samples, size * ranks, ranks)), None)
    if fits is not None:
        ways.insert(0, f"data.batch_size={fits}")
    return f"{', '.join(ways[:-1])} or {ways[-1]}"


def _last(samples: int, global_batch: int, ranks: int) -> list[int]:
    rest = samples % global_batch or global_batch
    return [len(range(rank, rest, ranks)) for rank in range(ranks)]
