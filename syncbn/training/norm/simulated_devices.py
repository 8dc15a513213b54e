"""Implements the setting ``simulate=``: one process trains as several devices would."""

from math import ceil, floor
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import LayerSync
from omegaconf import OmegaConf
from torch import nn

from syncbn.nn import simulation
from syncbn.nn.simulation import Simulated
from syncbn.nn.torch_internals import BatchNormBase, DropoutBase, InstanceNormBase
from syncbn.training.config.plan import Plan
from syncbn.training.data.loaders import TrainLoader
from syncbn.training.errors import SettingError
from syncbn.training.norm.shuffle_plugin import RefuseUnshuffled, ShufflePlugin
from syncbn.training.norm.trainer_parts import Parts

DROPS = ("drop_prob", "drop_rate")  # attributes of timm's DropPath, DropBlock and networks, which call F.dropout
HAVE_DROPOUT = (nn.RNNBase, nn.MultiheadAttention)  # layers with an argument ``dropout``


def parts(plan: Plan) -> Parts:
    """The plugins and callbacks with which one process trains as ``simulate`` devices would."""
    cfg = plan.cfg
    norm: dict[str, Any] = dict(OmegaConf.to_container(cfg.norm))  # type: ignore[arg-type]  # of a DictConfig it is one
    callbacks: list[pl.Callback] = [RefuseRest(plan.global_batch_size, plan.batches_at_once)]
    if norm["name"] in ("none", "group_norm"):
        return Parts([], callbacks, {})
    plugin: LayerSync = SimulatedDevicesPlugin(norm, cfg.simulate, plan.batches_at_once)
    callbacks.append(SimulatedStatistics())
    if norm["name"] == "shuffle":
        plugin = ShufflePlugin(norm["part"], seed=cfg.seed, batches_at_once=plan.batches_at_once, layers=plugin)
        callbacks.append(RefuseUnshuffled(plugin))
    return Parts([plugin], callbacks, {})


def refuse(model: nn.Module, batches_at_once: int = 1) -> None:
    """Raise if the model has a layer with which one process would train differently from several devices.

    Random draws by a function (not a layer) in a forward pass are not detected.

    Args:
        model: the model with the batch norm layers that it will be trained with.
        batches_at_once: accumulated batches that one process computes together.

    Raises:
        SettingError: several batches at once, whose samples the loss would compare (``compares_samples = True`` in the
            class of the model); a layer that draws random numbers in training, since each device has its own; instance
            norm with running statistics, which would be over all devices' samples; batch norm without running
            statistics, whose evaluation depends on the batches. The error names the layer.
    """
    if batches_at_once > 1 and getattr(model, "compares_samples", False):
        hint = f"with simulate the loss of {type(model).__name__} would compare images of all these batches; use 1"
        raise SettingError("trainer.accumulate_grad_batches", batches_at_once, hint)
    for name, layer in model.named_modules():
        p = _dropped(layer)
        if layer.training and p > 0:
            reason, use = f"has dropout {p:g}, which each device draws separately", "0"
        elif isinstance(layer, InstanceNormBase) and layer.track_running_stats:
            reason, use = "has running statistics of each device's own samples", "track_running_stats=False"
        elif isinstance(layer, BatchNormBase) and layer.running_mean is None:
            reason, use = "has no running statistics, so it is evaluated by batches", "track_running_stats=True"
        elif isinstance(layer, BatchNormBase) and type(layer) not in simulation.SIMULATED:
            reason, use = "is no batch norm class of torch's, which alone are simulated", "such a class"
        else:
            continue
        raise SettingError(
            "simulate", hint=f"{name} ({type(layer).__name__}) {reason}; use {use} there, or simulate=null"
        )


def _dropped(layer: nn.Module) -> float:
    """The share of values that a layer sets to zero at random: dropout, or stochastic depth of timm and torchvision."""
    if isinstance(layer, HAVE_DROPOUT):
        return float(layer.dropout)
    if isinstance(layer, DropoutBase) or type(layer).__name__ == "StochasticDepth":
        return float(layer.p)  # type: ignore[arg-type]
    rates = (getattr(layer, name, None) for name in DROPS)
    return max((float(rate) for rate in rates if isinstance(rate, float)), default=0.0)


class RefuseRest(pl.Callback):
    """Raises if the last optimizer step of an epoch would have fewer batches than the others.

    Devices would take that smaller step, but the simulation in one process would leave it out.
    """

    def __init__(self, global_batch_size: int, accumulate: int) -> None:
        self.global_batch_size, self.accumulate = global_batch_size, accumulate

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.accumulate == 1:
            return
        loader = trainer.train_dataloader
        name = "simulate and trainer.accumulate_grad_batches"
        if not isinstance(loader, TrainLoader) or trainer.num_training_batches < len(loader):
            hint = "these need loaders of syncbn.training.data and no trainer.limit_train_batches"
            raise SettingError(name, self.accumulate, hint)
        whole = loader.sampler.samples / self.global_batch_size
        batches = ceil(whole) if loader.sampler.remainder == "pad" else floor(whole)
        if batches % self.accumulate:
            raise SettingError(
                name,
                self.accumulate,
                f"an epoch has {batches} batches of {self.global_batch_size}, so its last step would be a smaller one; "
                f"use data of a multiple of {self.accumulate * self.global_batch_size} images",
            )


class SimulatedDevicesPlugin(LayerSync):
    """Makes batch norm layers simulate devices while Lightning fits the model.

    Args:
        norm: resolved settings of ``norm``, with the name "sync", "ghost", "local", "local_mean" or
            "shuffle", which has the statistics of "local".
        devices: number of simulated devices.
        accumulate: number of accumulated batches that one batch of this process contains.
    """

    def __init__(self, norm: dict[str, Any], devices: int, accumulate: int = 1) -> None:
        self.norm, self.devices, self.accumulate = norm, devices, accumulate

    def apply(self, model: nn.Module) -> nn.Module:
        ghost_batch = self.norm.get("ghost_batch")
        group = 1 if ghost_batch is not None else self.norm.get("group", 1)  # ghost batches stay within a device
        simulation.simulate(
            model,
            self.devices,
            sharing=self.devices if group in ("world", "node") else group,
            ghost_batch=ghost_batch,
            keep="each" if self.norm["name"] == "local_mean" else "first",
            only=self.norm.get("only"),
            accumulate=self.accumulate,
        )
        # Layers that norm.only does not select use per-device statistics.
        return simulation.simulate(model, self.devices, accumulate=self.accumulate)

    def revert(self, model: nn.Module) -> nn.Module:
        return simulation.unsimulate(model)


class SimulatedStatistics(pl.Callback):
    """Pools the simulated devices' running statistics when ranks would, and saves them in checkpoints."""

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._model: pl.LightningModule | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._model = pl_module
        for name, layer in _layers(pl_module):
            for row, loaded in zip(layer.rows or (), self._loaded.get(name, ()), strict=False):
                # The shapes differ if the run resumes at the end of an epoch with another number of devices. The
                # devices then keep the layer's own statistics.
                if row.shape == loaded.shape:
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
