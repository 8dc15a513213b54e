"""Measures how many steps and seconds training takes until a validation metric first reaches a target."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from syncbn.training.console import print_line
from syncbn.training.errors import AgreedError, SettingError


class TimeToTarget(pl.Callback):
    """Records when a validation first reaches ``target``; training continues.

    The resolution is the interval of validations (``trainer.val_check_interval=4``: every fourth batch). The seconds
    are training time by rank 0's clock, including data loading and the cost of shared statistics. The clock is stopped
    during validations, and from the writing of a checkpoint until the next batch. A resumed run continues both counts
    from the checkpoint. Place this callback before callbacks that take long in ``on_validation_start``.

    Args:
        monitor: name of an accuracy that validations log, with the same value on all ranks.
        target: the accuracy to reach, above 0 and at most 1.

    Raises:
        SettingError: ``target`` is out of range.
        AgreedError: on all ranks, when training begins, if there is no validation; at the first validation, if it does
            not log ``monitor``.
    """

    def __init__(self, monitor: str, target: float) -> None:
        if not 0 < target <= 1:
            raise SettingError("target", target, "use an accuracy above 0 and at most 1, or null")
        self.monitor, self.target = monitor, target
        self._seconds = 0.0
        self._since: float | None = None  # None while the clock is stopped
        self._steps = 0
        self._reached: dict[str, float] | None = None
        self._counted = True  # whether steps and seconds were counted from the first step of the run on

    @property
    def result(self) -> dict[str, float]:
        """``target/steps`` and ``target/seconds`` until the target was reached, and ``target/reached``, 1 or 0.

        If the target was not reached, the first two are those of the whole training, which is a lower bound. Empty if
        training resumed from a checkpoint that was written without this target, which may have been reached earlier.
        """
        if not self._counted:
            return {}
        found = self._reached or {"steps": self._steps, "seconds": self._seconds}
        return {f"target/{name}": value for name, value in found.items()} | {"target/reached": int(bool(self._reached))}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:
            raise AgreedError(
                "target",
                self.target,
                "there is no validation to measure it; use data with a val_dataloader and trainer.limit_val_batches "
                "above 0, or target=null",
            )
        self._counted = self._counted and (trainer.global_step == 0 or self._seconds > 0)
        if not self._counted and trainer.is_global_zero:
            print_line(
                f"warning: target={self.target}: training resumes from a checkpoint that was written without this "
                "target, so it may have been reached before; no target/ metrics are reported",
                error=True,
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start_clock()

    def on_train_batch_start(self, *_: Any) -> None:
        self._start_clock()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._steps = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise AgreedError(
                "target",
                self.target,
                f"validations log no {self.monitor} (callbacks.checkpoint.monitor), but {logged}",
            )
        accuracy = trainer.callback_metrics[self.monitor]
        # Compared in the metric's type: an accuracy of 19/20 in float32 is below 0.95 as a Python float.
        if self._reached is None and accuracy >= accuracy.new_tensor(self.target):
            self._reached = {"steps": trainer.global_step, "seconds": self._seconds}
        self._start_clock()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._stop_clock(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock(pl_module)

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._since is None else time.monotonic() - self._since
        settings = {"monitor": self.monitor, "target": self.target, "counted": self._counted}
        return settings | {"steps": self._steps, "seconds": self._seconds + running, "reached": self._reached}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._seconds, self._reached = (state_dict[name] for name in ("steps", "seconds", "reached"))
        same = (state_dict["monitor"], state_dict["target"]) == (self.monitor, self.target)
        self._counted = state_dict["counted"] and (same or not self._steps)

    def _start_clock(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def _stop_clock(self, pl_module: pl.LightningModule) -> None:
        if self._since is None:
            return
        if pl_module.device.type == "cuda":  # kernels that are queued belong to the training time
            torch.cuda.synchronize(pl_module.device)
        self._seconds, self._since = self._seconds + time.monotonic() - self._since, None
