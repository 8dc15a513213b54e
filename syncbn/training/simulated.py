"""``simulate=``: one process that stands for several devices."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import LayerSync
from torch import nn

from syncbn.nn import simulation
from syncbn.nn.simulation import Simulated
from syncbn.training.norms import Parts


def parts(norm: dict[str, Any], devices: int) -> Parts:
    """The parts of Lightning by which one process normalizes as so many devices would with ``norm``."""
    if norm["name"] in ("none", "group_norm"):
        return Parts([], [], {})
    return Parts([SimulatedDevicesPlugin(norm, devices)], [SimulatedStatistics()], {})


class SimulatedDevicesPlugin(LayerSync):
    """Makes batch norm layers simulate devices while Lightning fits the model.

    Args:
        norm: settled settings of ``norm``: "sync", "local" or "local_mean".
        devices: how many.
    """

    def __init__(self, norm: dict[str, Any], devices: int) -> None:
        self.norm, self.devices = norm, devices

    def apply(self, model: nn.Module) -> nn.Module:
        norm, keep = self.norm, "each" if self.norm["name"] == "local_mean" else "first"
        if norm["name"] == "sync":
            sharing = self.devices if norm["group"] in ("world", "node") else norm["group"]
            simulation.simulate(
                model, self.devices, sharing=sharing, ghost_batch=norm["ghost_batch"], only=norm["only"]
            )
        return simulation.simulate(model, self.devices, keep=keep)

    def revert(self, model: nn.Module) -> nn.Module:
        return simulation.unsimulate(model)


class SimulatedStatistics(pl.Callback):
    """Pools what devices keep each by itself when ranks would, and keeps it for a resume."""

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._model: pl.LightningModule | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._model = pl_module
        for name, layer in _layers(pl_module):
            for row, loaded in zip(layer.rows or (), self._loaded.get(name, ()), strict=False):
                row.copy_(loaded)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for _, layer in _layers(pl_module):
            layer.pool()

    on_train_epoch_end = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        return {} if self._model is None else {name: layer.rows for name, layer in _layers(self._model) if layer.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


def _layers(model: nn.Module) -> list[tuple[str, Simulated]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Simulated)]
