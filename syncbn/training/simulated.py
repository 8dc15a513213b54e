"""``simulate=``: one process that stands for several devices."""

from math import ceil, floor
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import LayerSync
from omegaconf import DictConfig, OmegaConf
from torch import nn

from syncbn.nn import simulation
from syncbn.nn.simulation import Simulated
from syncbn.training.loaders import TrainLoader
from syncbn.training.norms import Parts
from syncbn.training.schema import SettingError


def parts(cfg: DictConfig) -> Parts:
    """The parts of Lightning by which one process learns what ``cfg.simulate`` devices would."""
    norm: dict[str, Any] = dict(OmegaConf.to_container(cfg.norm))  # type: ignore[arg-type]  # of a DictConfig it is one
    callbacks: list[pl.Callback] = [RefuseRest(cfg.data.global_batch_size, accumulated(cfg))]
    if norm["name"] in ("none", "group_norm"):
        return Parts([], callbacks, {})
    plugin = SimulatedDevicesPlugin(norm, cfg.simulate, accumulated(cfg))
    return Parts([plugin], [*callbacks, SimulatedStatistics()], {})


def batch_size(cfg: DictConfig) -> int:
    """Samples that the one process takes at once: all of a step of the optimizer."""
    return int(cfg.data.global_batch_size * accumulated(cfg))


def accumulated(cfg: DictConfig) -> int:
    """Batches in a step of the optimizer."""
    return int(cfg.trainer.get("accumulate_grad_batches") or 1)


class RefuseRest(pl.Callback):
    """Refuses data of which devices would take a smaller last step in an epoch, which one process would leave out.

    Args:
        global_batch_size: samples over all devices.
        accumulate: batches in a step of the optimizer.
    """

    def __init__(self, global_batch_size: int, accumulate: int) -> None:
        self.global_batch_size, self.accumulate = global_batch_size, accumulate

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.accumulate == 1:
            return
        loader = trainer.train_dataloader
        name = f"simulate and trainer.accumulate_grad_batches={self.accumulate}"
        if not isinstance(loader, TrainLoader) or trainer.num_training_batches < len(loader):
            raise SettingError(f"{name}: these want loaders of syncbn.training.data and no trainer.limit_train_batches")
        whole = loader.sampler.samples / self.global_batch_size
        batches = ceil(whole) if loader.sampler.remainder == "pad" else floor(whole)
        if batches % self.accumulate:
            raise SettingError(
                f"{name}: an epoch has {batches} batches of {self.global_batch_size}, so its last step would be a "
                f"smaller one; use data of a multiple of {self.accumulate * self.global_batch_size} images"
            )


class SimulatedDevicesPlugin(LayerSync):
    """Makes batch norm layers simulate devices while Lightning fits the model.

    Args:
        norm: settled settings of ``norm``: "sync", "ghost", "local" or "local_mean".
        devices: how many.
        accumulate: batches in one that are accumulated for one step of the optimizer.
    """

    def __init__(self, norm: dict[str, Any], devices: int, accumulate: int = 1) -> None:
        self.norm, self.devices, self.accumulate = norm, devices, accumulate

    def apply(self, model: nn.Module) -> nn.Module:
        group = self.norm.get("group", 1)
        simulation.simulate(
            model,
            self.devices,
            sharing=self.devices if group in ("world", "node") else group,
            ghost_batch=self.norm.get("ghost_batch"),
            keep="each" if self.norm["name"] == "local_mean" else "first",
            only=self.norm.get("only"),
            accumulate=self.accumulate,
        )
        return simulation.simulate(model, self.devices, accumulate=self.accumulate)  # what norm.only has left

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
