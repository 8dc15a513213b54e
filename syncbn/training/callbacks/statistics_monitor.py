"""Which layers need shared statistics, and what sharing costs: measured while a network trains."""

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
from syncbn.training.callbacks.step_probe import Look
from syncbn.training.errors import SettingError
from syncbn.training.lightning_internals import accumulates, logged_step
from syncbn.training.loggers.csv_logger import MetricsFile

COLUMNS = ("step", "layer", *device_spread.Figures._fields, "seconds")
FEW = 16  # layers that loggers get one by one


class StatisticsMonitor(pl.Callback):
    """Looks at how much the devices' batches differ in each batch norm layer, and how long the layers' messages take.

    For synchronized and per-device layers alike. Rank 0 writes ``statistics.csv``, a row a layer and look: ``step`` (as
    in ``metrics.csv``), ``layer`` (its name as ``norm.only`` takes it), the
    :class:`~.device_spread.Figures` of the world's batch, and ``seconds``, the mean over ranks of the time in
    the layer's messages forward and backward, waiting for other ranks included; empty where it cannot be told. The
    loggers get ``statistics/LAYER/spread`` and ``.../effective_batch``, of more than 16 layers the mean and the
    greatest spread and the least ratio of effective to device batch, and ``statistics/collective_share``, the share of
    the messages in the time of the step: forward, backward and optimizer, from its first batch's begin to its last
    one's end. That its data was fetched before is left out.

    A synchronized layer's figures come from the numbers that it sends anyway; a per-device one's batch is summed.
    Between looks nothing is done; a look is one all-reduce, whatever the number of layers. Where a layer runs several
    times in a step, or the step has several batches, figures are of the first time, seconds of all. A step with a
    validation in its midst is passed over. A layer that did not run has no row. Nothing is seen within compiled
    networks, and there is nothing to see in one process.

    Args:
        every_n_steps: optimizer steps between two looks; None for ``trainer.log_every_n_steps``.
        directory: where ``statistics.csv`` goes; None for ``trainer.log_dir``.

    Raises:
        SettingError: ``every_n_steps`` below 1.
    """

    def __init__(self, every_n_steps: int | None = None, directory: str | Path | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise SettingError("callbacks.statistics.every_n_steps", every_n_steps, "use 1 or more, or null")
        self.every_n_steps, self.directory = every_n_steps, directory
        self._layers: dict[str, BatchNormBase] = {}
        self._layout = device_spread.Layers([])
        self._renamed: dict[str, str] = {}
        self._file: MetricsFile | None = None
        self._look: Look | None = None
        self._active = self._warm = self._midway = False
        self._looks, self._seconds, self._step_seconds = 0, 0.0, 0.0

    @property
    def collectives(self) -> dict[str, float] | None:
        """Of the batch norm layers' messages: ``seconds_per_step`` and their ``share`` in the time of a step (forward,
        backward and optimizer; fetching data left out).

        Means over the looks of this process, the first step left out (the warm-up), and over ranks; zero where there is
        no such layer. None where there was no such look, where it cannot be told, and on ranks other than 0.
        """
        if not self._looks:
            return dict.fromkeys(("seconds_per_step", "share"), 0.0) if self._active and not self._layers else None
        return {"seconds_per_step": self._seconds / self._looks, "share": self._seconds / self._step_seconds}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._layers, self._warm, self._midway = dict(batch_norms(pl_module)), False, False
        self._looks, self._seconds, self._step_seconds = 0, 0.0, 0.0
        self._active = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not self._layers:
            return
        channels = [layer.num_features for layer in self._layers.values()]
        self._layout = device_spread.Layers(channels).to(pl_module.device)
        self._rename()
        directory = trainer.log_dir if self.directory is None else self.directory  # a message: all ranks ask
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            place = Path(directory or trainer.default_root_dir)
            place.mkdir(parents=True, exist_ok=True)
            self._file = MetricsFile(place, "statistics.csv", COLUMNS)
            # What an earlier attempt has seen after the checkpoint comes again. The step is the loggers' (see there).
            self._file.cut(0, min(trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1))

    def on_train_epoch_start(self, *_: Any) -> None:
        self._drop()
        self._midway = False

    def on_validation_start(self, *_: Any) -> None:
        self._drop()  # its time is none of the step's

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        every = trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps  # type: ignore[attr-defined]
        due = every > 0 and (logged_step(trainer) + 1) % every == 0  # when Lightning logs metrics of a step
        if due and not self._midway and self._look is None and self._active and self._layers:
            self._look = Look(self._layers, pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._midway = accumulates(trainer)
        if self._midway:
            return
        if self._look is not None:
            self._look.close()
            total = self._look.message(self._layout)
            dist.all_reduce(total)
            self._look = None
            if trainer.is_global_zero:
                self._report(trainer, total)
        self._warm = True

    def on_train_end(self, *_: Any) -> None:
        self._drop()
        for name, before in self._renamed.items():
            self._layers[name].__dict__["name_in_model"] = before
        self._renamed = {}

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def _rename(self) -> None:
        """Gives each synchronized layer the name that it has here, for what it says to tell it from the others."""
        for name, layer in self._layers.items():
            if isinstance(layer, Synchronized) and layer.name_in_model != name:
                self._renamed[name] = layer.name_in_model
                layer.name_in_model = name

    def _drop(self) -> None:
        if self._look is not None:
            self._look.close()
        self._look = None

    def _report(self, trainer: pl.Trainer, total: torch.Tensor) -> None:
        ranks, step = trainer.world_size, logged_step(trainer)
        count = 2 + len(self._layers)
        step_seconds, all_seconds, *seconds = (total[:count] / ranks).tolist()
        # torch's own layer sends in its own way, of which nothing is known.
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
            self._looks += 1
            self._seconds += all_seconds
            self._step_seconds += step_seconds
            metrics["statistics/collective_share"] = all_seconds / step_seconds
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step)


def _summary(found: dict[str, device_spread.Figures]) -> dict[str, float]:
    """What loggers get of the layers' figures."""
    if len(found) <= FEW:
        return {
            f"statistics/{layer}/{name}": value
            for layer, figures in found.items()
            for name, value in _known(figures).items()
            if name in ("spread", "effective_batch")
        }
    spreads = [each.spread for each in found.values() if not math.isnan(each.spread)]
    worths = [
        each.effective_batch / each.device_batch for each in found.values() if not math.isnan(each.effective_batch)
    ]
    metrics = {"statistics/mean_spread": fmean(spreads), "statistics/max_spread": max(spreads)} if spreads else {}
    return metrics | ({"statistics/min_effective_share": min(worths)} if worths else {})


def _known(figures: device_spread.Figures) -> dict[str, float]:
    return {name: value for name, value in figures._asdict().items() if not math.isnan(value)}
