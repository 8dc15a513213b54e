"""Averages the weights over the steps of a training (EMA) or over its epochs (SWA), for validation, test and files.

Training goes on with the raw weights. Validation, ``state_dict`` of every checkpoint and the weights after training are
the average. ``current_model_state`` of a checkpoint has the raw weights, from which a resumed run continues. These are
the keys of Lightning's WeightAveraging (2.6.6), which differs in four points that are wrong for this program. It
truncates the average of integers (``num_batches_tracked``). It averages half-precision weights in half precision, where
``1 - decay`` is lost to rounding. Its ranks keep different running statistics where batch norm is not synchronized. An
average of epochs is taken after the validation of the epoch that it should include.
"""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from syncbn.nn.conversion.convert import batch_norms
from syncbn.nn.simulation import Simulated
from syncbn.training.console import print_line
from syncbn.training.errors import AgreedError
from syncbn.training.evaluation.precise_statistics import PreciseStatistics
from syncbn.training.norm.pooled_statistics import pooled_buffers

CURRENT, AVERAGING = "current_model_state", "averaging_state"  # keys in a checkpoint
WARMUP_POWER = 2 / 3  # of timm's ModelEmaV3
RUNNING = ("running_mean", "running_var")


class WeightAverage(pl.Callback):
    """The part that EMA and SWA share; alone it averages nothing.

    Put it behind the callbacks of the norm and in front of all that log the learning rate.

    Args:
        bn_batches: number of training batches on each rank over which the batch norm statistics of the averaged weights
            are measured before each validation; None for a whole epoch; 0 to average the running statistics too.
        per_rank: every rank has its own running statistics (``norm=local_mean``): the average is of the pooled ones.
    """

    def __init__(self, *, bn_batches: int | None = 0, per_rank: bool = False) -> None:
        self.bn_batches, self.per_rank = bn_batches, per_rank
        self.average: dict[str, Tensor] = {}  # by name in the state dict; empty before the first update
        self.updates = 0  # how many states of the weights the average has seen
        self._measured = 0  # the number of updates when the statistics were measured
        self._step = 0  # the optimizer step of the last update
        self._current: dict[str, Tensor] | None = None  # the raw weights, while the module has the average
        self._precise = PreciseStatistics(max(bn_batches or 1, 1), every_n_epochs=None)

    def description(self) -> dict[str, Any]:
        """What an average is of, for a checkpoint."""
        return {"kind": type(self).__name__}

    def continues(self, saved: dict[str, Any]) -> bool:
        """Whether the average of a checkpoint, with this description, is the beginning of this one."""
        return type(self) is not WeightAverage and saved.get("kind") == type(self).__name__

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Whether the weights after this optimizer step are part of the average."""
        return False

    def merge(self, average: list[Tensor], values: list[Tensor]) -> None:
        """Moves the average, in place, by the values of one state."""

    @torch.no_grad()
    def update(self, pl_module: pl.LightningModule) -> None:
        """Add the present weights to the average. The first update is a copy.

        Integers are not averaged: counters, such as batch norm's, are those of the raw weights.
        """
        values = _values(pl_module) | pooled_buffers(pl_module, over_ranks=self.per_rank)
        if self.updates == 0:
            self.average = {name: _exact(value, copy=True) for name, value in values.items()}
        else:
            now = [_exact(values[name], copy=False) for name in self.average]
            self.merge(list(self.average.values()), now)
        self.updates += 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._precise.on_train_batch_start(trainer, pl_module)  # finds the layers that are frozen

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step > self._step and self.is_due(trainer):
            self.update(pl_module)
        self._step = max(self._step, trainer.global_step)

    # The norm's callbacks pool the raw running statistics in on_validation_start, which Lightning calls before.
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._swap_in(trainer, pl_module)

    # ModelCheckpoint saves in on_validation_end, which Lightning calls later.
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._current is not None:
            _copy(self._current, _values(pl_module))
            self._current = None

    # Lightning calls ModelCheckpoint after all other callbacks in this hook; resume points are written even later.
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the average for the checkpoints of this epoch, if no validation has done so after its last update."""
        if self.bn_batches != 0 and self._measured != self.updates:
            self._swap_in(trainer, pl_module)
            self.on_validation_epoch_end(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module with the average: later callbacks and a test without a checkpoint have it."""
        self._swap_in(trainer, pl_module)

    @torch.no_grad()
    def _swap_in(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.updates:
            return
        self._take_from_rank_0(pl_module)
        values = _values(pl_module)
        self._current = {name: value.clone() for name, value in values.items()}
        _copy(self.average, values)
        if self.bn_batches != 0 and self._measured != self.updates:
            self._measure(trainer, pl_module)
            self._measured = self.updates

    def _take_from_rank_0(self, pl_module: pl.LightningModule) -> None:
        """Takes the buffers of rank 0, as DistributedDataParallel does before each forward pass (norm=local)."""
        names = {name for name, _ in pl_module.named_buffers()} & self.average.keys()
        for name in sorted(names) if dist.is_initialized() and dist.get_world_size() > 1 else ():
            dist.broadcast(self.average[name], 0)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the batch norm statistics of the averaged weights; they become part of the average."""
        layers = {name: layer for name, layer in batch_norms(pl_module) if layer.running_mean is not None}
        if not layers:
            return
        self._precise.num_batches = self.bn_batches or _batches_of_epoch(trainer)
        rows = [row for layer in layers.values() if isinstance(layer, Simulated) for row in layer.rows or ()]
        before = [row.clone() for row in rows]  # the raw statistics of simulated devices
        self._precise.measure(trainer, pl_module)
        for row, kept in zip(rows, before, strict=True):
            row.copy_(kept)
        values = _values(pl_module)
        names = [f"{name}.{buffer}" for name in layers for buffer in RUNNING]
        _copy({name: values[name] for name in names}, self.average)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self.updates:
            return
        raw = checkpoint["state_dict"] | (self._current or {})
        checkpoint[CURRENT] = raw
        checkpoint["state_dict"] = raw | {name: value.to(raw[name].dtype) for name, value in self.average.items()}
        checkpoint[AVERAGING] = {
            **self.description(),
            "updates": self.updates,
            "measured": self._measured,
            "step": self._step,
            "average": {name: value for name, value in self.average.items() if value.dtype != raw[name].dtype},
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Continue from the raw weights of a checkpoint; a test keeps the average, which is its ``state_dict``."""
        if trainer.state.fn != TrainerFn.FITTING or CURRENT not in checkpoint:
            return
        self._precise.on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint.get(AVERAGING, {})
        self._step = state.get("step", 0)
        if self.continues(state):
            self.updates, self._measured = state["updates"], state["measured"]
            average = checkpoint["state_dict"] | state["average"]
            device = pl_module.device
            self.average = {
                name: _exact(average[name].to(device), copy=True) for name in _values(pl_module) if name in average
            }
        elif type(self) is not WeightAverage and trainer.is_global_zero:
            print_line("the checkpoint's average is of another kind or of earlier epochs: a new average begins")
        pl_module.load_state_dict(checkpoint[CURRENT], strict=pl_module.strict_loading)


class EMA(WeightAverage):
    """The exponential moving average of the weights after each optimizer step (Polyak & Juditsky 1992; timm, torch).

    ``average = decay * average + (1 - decay) * weights``, from the weights after the first step.

    Args:
        decay: from 0 to 1.
        every_n_steps: optimizer steps between two updates; ``decay`` is of one update.
        warmup: begin with a smaller decay, ``1 - (1 + updates) ** (-2 / 3)``, until ``decay`` is reached (timm).
        more: of :class:`WeightAverage`.
    """

    def __init__(self, decay: float, *, every_n_steps: int = 1, warmup: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.decay, self.every_n_steps, self.warmup = decay, every_n_steps, warmup

    def is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step // self.every_n_steps > self._step // self.every_n_steps

    def merge(self, average: list[Tensor], values: list[Tensor]) -> None:
        get_ema_multi_avg_fn(self.decay_now())(average, values, self.updates)

    def decay_now(self) -> float:
        """The decay of the next update."""
        return min(self.decay, 1 - (1 + self.updates) ** -WARMUP_POWER) if self.warmup else self.decay


class SWA(WeightAverage):
    """The mean of the weights at the ends of the last epochs (stochastic weight averaging, Izmailov et al. 2018).

    The weights of an epoch are added before its validation, so the validation is of the average with them.

    Args:
        first_epoch: the first epoch whose weights count, from 0.
        lr: the learning rate from its beginning on, times each group's ``lr_scale``; None for that of the schedule.
        more: of :class:`WeightAverage`.
    """

    def __init__(self, first_epoch: int, *, lr: float | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.first_epoch, self.lr = first_epoch, lr

    def description(self) -> dict[str, Any]:
        return super().description() | {"first_epoch": self.first_epoch}

    def continues(self, saved: dict[str, Any]) -> bool:
        """Not if the mean now begins later: that of the checkpoint has epochs that do not count."""
        return super().continues(saved) and self.first_epoch <= saved["first_epoch"]

    def is_due(self, trainer: pl.Trainer) -> bool:
        return trainer.is_last_batch and trainer.current_epoch >= self.first_epoch

    def merge(self, average: list[Tensor], values: list[Tensor]) -> None:
        get_swa_multi_avg_fn()(average, values, self.updates)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *more: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *more)
        if self.lr is None or trainer.current_epoch < self.first_epoch:
            return
        # The scheduler sets its own rate after each step or epoch; this is before the next optimizer step.
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * group.get("lr_scale", 1.0)


def build(
    averaging: dict[str, Any], max_epochs: int | None, *, per_rank: bool, batches_at_once: int = 1
) -> WeightAverage:
    """The callback of the settings ``averaging``; a batch of the loader holds ``batches_at_once`` batches.

    Without an average it only makes a resumed run continue from the raw weights of a checkpoint that has both.
    """
    asked = averaging["bn_batches"]
    batches = None if asked is None else asked // batches_at_once
    if averaging["ema"] is not None:
        more = {"every_n_steps": averaging["every_n_steps"], "warmup": averaging["warmup"]}
        return EMA(averaging["ema"], bn_batches=batches or 0, per_rank=per_rank, **more)
    if averaging["swa_from"] is not None:
        first = first_epoch(averaging["swa_from"], max_epochs or 0)
        return SWA(first - 1, lr=averaging["swa_lr"], bn_batches=batches, per_rank=per_rank)
    return WeightAverage()


def first_epoch(swa_from: float, max_epochs: int) -> int:
    """The first epoch that SWA averages, counted from 1: ``swa_from`` is that number, or a share of all epochs."""
    return int(swa_from) if swa_from >= 1 else int(swa_from * max_epochs) + 1


def _values(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    """The parameters and buffers with real or complex numbers, by name; they share memory with the module."""
    found = pl_module.state_dict().items()
    return {
        name: value
        for name, value in found
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    }


def _exact(value: Tensor, *, copy: bool) -> Tensor:
    """The value in single precision, if it is in less."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=copy)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)


def _batches_of_epoch(trainer: pl.Trainer) -> int:
    number = trainer.num_training_batches
    if number == float("inf"):
        hint = "the training data have no length, so an epoch has no number of batches; use averaging.bn_batches=100"
        raise AgreedError("averaging.bn_batches", None, hint)
    return int(number)
