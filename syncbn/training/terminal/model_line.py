"""Prints one line about the model when a run starts: parameters, operations of a forward pass, batch norm layers."""

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from syncbn.nn.conversion.convert import batch_norms
from syncbn.nn.modules import Synchronized
from syncbn.nn.population_statistics import model_input
from syncbn.nn.simulation import Simulated
from syncbn.nn.torch_internals import BatchNormBase
from syncbn.training.console import print_line
from syncbn.training.models import flops


class ModelLine(pl.Callback):
    """Prints the line on rank 0 before the first batch of training, or of a test without training.

    It only reads: no layer of the model is called, and no random number is drawn. Place it before callbacks that add
    hooks to layers in ``setup``.
    """

    def __init__(self) -> None:
        self._shadow: nn.Module | None = None
        self._printed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and not self._printed:
            self._shadow = flops.shadow(flops.network_of(pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.is_global_zero and not self._printed:
            sample = flops.first(model_input(batch))
            operations = None if self._shadow is None else flops.count(self._shadow, sample)
            print_line(describe(pl_module, operations, trainer.world_size))
        self._printed, self._shadow = True, None

    on_test_batch_start = on_train_batch_start


def describe(model: nn.Module, operations: int | None = None, ranks: int = 1) -> str:
    """The line.

    Args:
        model: with its batch norm layers as they train.
        operations: of one sample's forward pass; None if they are not known.
        ranks: the number of ranks, for layers that all of them share.
    """
    known = [each for each in model.parameters() if not is_lazy(each)]
    numbers = [(each.numel(), each.requires_grad) for each in known]
    total, trained = sum(number for number, _ in numbers), sum(number for number, trains in numbers if trains)
    share = "all train" if trained == total else f"{trained:,} train"
    share += "" if len(known) == len(list(model.parameters())) else "; without lazy layers, which have no shape yet"
    cost = [] if operations is None else [f"{_short(operations)}FLOPs per sample"]
    return "; ".join([", ".join([f"model: {total:,} parameters ({share})", *cost]), _norms(model, ranks)])


def _short(number: float) -> str:
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return f"{number:g} "


def _norms(model: nn.Module, ranks: int) -> str:
    """How many batch norm layers there are, and how each kind gets its statistics; the commonest first."""
    kinds = Counter(_statistics(layer, ranks) for _, layer in batch_norms(model))
    others = sum(isinstance(layer, nn.GroupNorm) for layer in model.modules())
    groups = [f"{others} group norm layer{'s' * (others != 1)}"] if others else []
    if not kinds:
        return ", ".join(["no batch norm layers", *groups])
    number = sum(kinds.values())
    parts = [f"{'all' if count == number else count} {kind}" for kind, count in kinds.most_common()]
    return ", ".join([f"{number} batch norm layer{'s' * (number != 1)}: {', '.join(parts)}", *groups])


def _statistics(layer: BatchNormBase, ranks: int) -> str:
    """Whose samples a batch norm layer takes its statistics from."""
    if not layer.training and layer.running_mean is not None:
        return "with running statistics"  # frozen, or in a test
    if isinstance(layer, Simulated):
        return _of_simulated(layer)
    if isinstance(layer, nn.SyncBatchNorm):
        group = layer.process_group
        return _over("world" if group is None else dist.get_world_size(group), ranks)
    if not isinstance(layer, Synchronized):
        return "per process"
    if layer.ghost_batch is not None:
        return f"in ghost batches of {layer.ghost_batch}"
    # Not groups.size(): it may create process groups, a collective, and this runs on rank 0 alone.
    return _over(len(layer.group) if isinstance(layer.group, tuple) else layer.group, ranks)


def _of_simulated(layer: Simulated) -> str:
    if layer.ghost_batch is not None:
        return f"in ghost batches of {layer.ghost_batch}"
    if layer.sharing == 1:
        return "per simulated device"
    return _over("world" if layer.sharing == layer.devices else layer.sharing, layer.devices, "simulated devices")


def _over(group: str | int, ranks: int, members: str = "processes") -> str:
    if group == 1 or (ranks == 1 and members == "processes"):
        return "per process"
    if group == "world":
        return f"synchronized over world ({ranks} {members})"
    return "synchronized over node" if group == "node" else f"synchronized over groups of {group} {members}"
