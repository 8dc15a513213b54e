"""Implements the settings ``freeze`` and ``freeze_norm``: parts of a network that do not train."""

from collections.abc import Sequence

import lightning.pytorch as pl
from torch import nn

from syncbn.nn.conversion.convert import batch_norms
from syncbn.training.errors import SettingError
from syncbn.training.network.names import matches, refuse_unmatched


def freeze(module: nn.Module, globs: Sequence[str]) -> None:
    """Freeze the parameters that the globs select: ``requires_grad`` is off, so no gradient is computed or all-reduced.

    Args:
        module: names begin here; ``network.stem*`` and ``network.stem`` both select all below ``network.stem``.
        globs: on the names of parameters and modules.

    Raises:
        SettingError: a glob selects nothing, or nothing is left to train.
    """
    names = [name for name, _ in module.named_parameters()]
    refuse_unmatched("freeze", globs, names)
    for name, parameter in module.named_parameters():
        if matches(name, globs):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise SettingError("freeze", list(globs), f"nothing is left to train of {len(names)} parameters; freeze fewer")


class FreezeNorm(pl.Callback):
    """Keeps batch norm layers in evaluation mode in training: they use their running statistics and do not move them.

    Nothing is all-reduced for such a layer. Lightning and user code put modules into training mode, so the mode is set
    before each batch.

    Args:
        globs: select the layers by their names, which begin at the LightningModule.
    """

    def __init__(self, globs: Sequence[str]) -> None:
        self.globs = list(globs)
        self._layers: list[nn.Module] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = batch_norms(pl_module, lambda name, layer: matches(name, self.globs))
        self._layers = [layer for _, layer in found if layer.running_mean is not None]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        for layer in self._layers:
            layer.training = False
