"""Logs per layer how much batch statistics differ between devices, and how long the layer's all-reduces take."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn

from syncbn.nn.conversion.convert import batch_norms
from syncbn.nn.modules import Synchronized
from syncbn.nn.torch_internals import BatchNormBase
from syncbn.training.callbacks import device_spread
from syncbn.training.callbacks.layer_monitor import MAX_LOGGED_LAYERS, LayerMonitor
from syncbn.training.callbacks.step_probe import StepProbe
from syncbn.training.lightning_internals import accumulates, logged_step

COLUMNS = ("step", "layer", *device_spread.Figures._fields, "seconds")


class StatisticsMonitor(LayerMonitor):
    """Measures how much the devices' batches differ in each batch norm layer, and the time of the layer's all-reduces.

    Works for synchronized and per-device layers. Rank 0 writes ``statistics.csv``, one row per layer and measured step:

    - ``step``, as in ``metrics.csv``;
    - ``layer``, the layer's name in the form that ``norm.only`` takes;
    - the :class:`~.device_spread.Figures` of the world's batch;
    - ``seconds``, the mean over ranks of the time in the layer's all-reduces in forward and backward, including the
      wait for other ranks; empty where it cannot be measured.

    The loggers get ``statistics/LAYER/spread`` and ``statistics/LAYER/effective_batch``. With more than 16 layers they
    get the mean and the largest spread, and the smallest ratio of effective batch to device batch. They also get
    ``statistics/collective_share``, the share of the all-reduces in the time of the step. That time covers forward,
    backward and optimizer, from the start of the step's first batch to the end of its last; loading data is excluded.

    The figures of a synchronized layer come from the sums that it all-reduces anyway; for a per-device layer the sums
    are computed. A measurement is one all-reduce for all layers together, and steps in between cost nothing. Where a
    layer runs several times in a step, or the step has several batches, the figures are of the first run and the
    seconds of all runs. A step that a validation interrupts is skipped. A layer that did not run has no row. Layers in
    compiled networks cannot be measured, and with one process nothing is measured.

    Args:
        every_n_steps: optimizer steps between two measurements; None for ``trainer.log_every_n_steps``.
        directory: directory of ``statistics.csv``; None for ``trainer.log_dir``.

    Raises:
        SettingError: ``every_n_steps`` below 1.
    """

    name = "statistics"

    def __init__(self, every_n_steps: int | None = None, directory: str | Path | None = None) -> None:
        super().__init__(every_n_steps, directory)
        self._layers: dict[str, BatchNormBase] = {}
        self._layout = device_spread.Layers([])
        self._renamed: dict[str, str] = {}
        self._probe: StepProbe | None = None
        self._active = self._warm = self._mid_step = False
        self._measurements, self._seconds, self._step_seconds = 0, 0.0, 0.0

    @property
    def collectives(self) -> dict[str, float] | None:
        """Time of the batch norm layers' all-reduces: ``seconds_per_step`` and its ``share`` in the time of a step.

        The time of a step covers forward, backward and optimizer, without loading data. The numbers are means over the
        ranks and over the measured steps of this process, without its first step (the warm-up). They are zero in a
        network without batch norm. None if no step was measured, if the time cannot be measured, and on ranks other
        than 0.
        """
        if not self._measurements:
            return dict.fromkeys(("seconds_per_step", "share"), 0.0) if self._active and not self._layers else None
        return {"seconds_per_step": self._seconds / self._measurements, "share": self._seconds / self._step_seconds}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._layers, self._warm, self._mid_step = dict(batch_norms(pl_module)), False, False
        self._measurements, self._seconds, self._step_seconds = 0, 0.0, 0.0
        self._active = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not self._layers:
            return
        channels = [layer.num_features for layer in self._layers.values()]
        self._layout = device_spread.Layers(channels).to(pl_module.device)
        self._name_layers()
        self._open_file(trainer, COLUMNS)

    def on_train_epoch_start(self, *_: Any) -> None:
        self._discard_probe()
        self._mid_step = False

    def on_validation_start(self, *_: Any) -> None:
        self._discard_probe()  # the time of a validation is not part of the step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._is_due(trainer) and not self._mid_step and self._probe is None and self._active and self._layers:
            self._probe = StepProbe(self._layers, pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._mid_step = accumulates(trainer)
        if self._mid_step:
            return
        if self._probe is not None:
            self._probe.close()
            total = self._probe.summary(self._layout)
            dist.all_reduce(total)
            self._probe = None
            if trainer.is_global_zero:
                self._report(trainer, total)
        self._warm = True

    def on_train_end(self, *_: Any) -> None:
        self._discard_probe()
        for name, before in self._renamed.items():
            self._layers[name].__dict__["name_in_model"] = before
        self._renamed = {}

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def _name_layers(self) -> None:
        """Give each synchronized layer its name in this module, by which the probe tells the all-reduces apart.

        ``on_train_end`` restores the previous names.
        """
        for name, layer in self._layers.items():
            if isinstance(layer, Synchronized) and layer.name_in_model != name:
                self._renamed[name] = layer.name_in_model
                layer.name_in_model = name

    def _discard_probe(self) -> None:
        if self._probe is not None:
            self._probe.close()
        self._probe = None

    def _report(self, trainer: pl.Trainer, total: torch.Tensor) -> None:
        ranks, step = trainer.world_size, logged_step(trainer)
        count = 2 + len(self._layers)
        step_seconds, all_seconds, *seconds = (total[:count] / ranks).tolist()
        # torch.nn.SyncBatchNorm calls its collectives itself, so their time cannot be measured.
        timed = not any(isinstance(layer, nn.SyncBatchNorm) for layer in self._layers.values())
        found = dict(zip(self._layers, self._layout.figures(total[count:]), strict=True))
        if self._file is not None:
            rows = [
                {"step": step, "layer": name, **_known(figures), **({"seconds": spent} if timed else {})}
                for (name, figures), spent in zip(found.items(), seconds, strict=True)
                if figures is not None
            ]
            self._file.append(rows)
        metrics = _summary({name: figures for name, figures in found.items() if figures is not None})
        if timed and self._warm:
            self._measurements += 1
            self._seconds += all_seconds
            self._step_seconds += step_seconds
            metrics["statistics/collective_share"] = all_seconds / step_seconds
        if metrics:
            self._log(trainer, metrics)


def _summary(found: dict[str, device_spread.Figures]) -> dict[str, float]:
    """The metrics for the loggers, from the layers' figures."""
    if len(found) <= MAX_LOGGED_LAYERS:
        return {
            f"statistics/{layer}/{name}": value
            for layer, figures in found.items()
            for name, value in _known(figures).items()
            if name in ("spread", "effective_batch")
        }
    spreads = [each.spread for each in found.values() if not math.isnan(each.spread)]
    ratios = [
        each.effective_batch / each.device_batch for each in found.values() if not math.isnan(each.effective_batch)
    ]
    metrics = {"statistics/mean_spread": fmean(spreads), "statistics/max_spread": max(spreads)} if spreads else {}
    return metrics | ({"statistics/min_effective_share": min(ratios)} if ratios else {})


def _known(figures: device_spread.Figures) -> dict[str, float]:
    """The figures that are not NaN."""
    return {name: value for name, value in figures._asdict().items() if not math.isnan(value)}
