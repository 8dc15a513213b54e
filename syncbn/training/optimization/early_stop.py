"""Ends training when the monitored metric no longer improves, and reports that and why."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import DictConfig, OmegaConf

from syncbn.training.console import print_line
from syncbn.training.errors import AgreedError


class EarlyStop(EarlyStopping):
    """Lightning's EarlyStopping with a line and a result that say why training ended.

    Args:
        monitor: the metric.
        mode: "max" or "min": what is better.
        patience: validations without an improvement until training ends.
        min_delta: a smaller change is no improvement.
    """

    def __init__(self, monitor: str, *, mode: str, patience: int, min_delta: float = 0.0) -> None:
        super().__init__(monitor, mode=mode, patience=patience, min_delta=min_delta)
        self.result: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.should_stop:  # a run that had stopped early, and is resumed with more epochs
            self.stopping_reason, self.stopping_reason_message = EarlyStoppingReason.NOT_STOPPED, None
            self.stopped_epoch = 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if _every_epoch(trainer):
            self._check_name(trainer)
        super().on_train_epoch_end(trainer, pl_module)
        self._report(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _every_epoch(trainer) and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._check_name(trainer)
        super().on_validation_end(trainer, pl_module)
        self._report(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            about = {"monitor": self.monitor, "best": float(self.best_score), "reason": self._why()}
            self.result = {"epoch": self.stopped_epoch + 1, **about}

    def _check_name(self, trainer: pl.Trainer) -> None:
        names = sorted(name for name in trainer.callback_metrics if not name.startswith("lr-"))
        if self.monitor not in names:
            hint = f"the module logs no metric of this name; it logs {', '.join(names)}"
            raise AgreedError("callbacks.checkpoint.monitor", self.monitor, hint)

    def _report(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and self.stopping_reason_message is not None and trainer.should_stop:
            print_line(f"training stops early, after epoch {self.stopped_epoch + 1}: {self._why()}")
            self.stopping_reason_message = None

    def _why(self) -> str:
        if self.stopping_reason is EarlyStoppingReason.NON_FINITE_METRIC:
            return f"{self.monitor} is not finite; its best value was {float(self.best_score):.4f}"
        by = f" by more than {abs(self.min_delta):g}" if self.min_delta else ""
        number = f"{self.wait_count} validation{'' if self.wait_count == 1 else 's'}"
        best = f"its best value is {float(self.best_score):.4f}"
        return f"{self.monitor} did not improve{by} in {number} (early_stopping.patience); {best}"


def _every_epoch(trainer: pl.Trainer) -> bool:
    """Whether Lightning's EarlyStopping reads the metric at each epoch's end; otherwise it does after validations."""
    return trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1


def build(cfg: DictConfig) -> list[pl.Callback]:
    """The callback of the settings ``early_stopping``; it watches what the best checkpoint is chosen by."""
    stopping = cfg.early_stopping
    if stopping.patience is None:
        return []
    mode = stopping.mode or OmegaConf.select(cfg, "callbacks.checkpoint.mode") or "min"
    monitor = str(cfg.callbacks.checkpoint.monitor)
    return [EarlyStop(monitor, mode=mode, patience=stopping.patience, min_delta=stopping.min_delta)]


def result(trainer: pl.Trainer) -> dict[str, Any]:
    """The part of ``result.json`` about early stopping; empty if training was not stopped early."""
    stops = [each for each in trainer.early_stopping_callbacks if isinstance(each, EarlyStop) and each.result]
    return {"stopped_early": stops[0].result} if stops else {}
