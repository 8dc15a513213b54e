"""How long training takes until the validation is as good as asked for: steps and seconds."""

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from syncbn.training.console import print_line
from syncbn.training.errors import AgreedError, SettingError


class TimeToTarget(pl.Callback):
    """Notes when a validation first reaches ``target``; training goes on.

    Validations are as often as the trainer makes them (``trainer.val_check_interval=4``: each fourth batch), and no
    step in between is noted. The seconds are those of training, its data and the cost of shared statistics included, by
    rank 0's clock, which stands still while validating and from when a checkpoint is written until the next batch. Both
    go on where a run goes on from a checkpoint. To come before callbacks that do something long before a validation.

    Args:
        monitor: an accuracy that is logged in validations; the same on all ranks.
        target: above 0, 1 at most.

    Raises:
        SettingError: another target; when training begins or at the first validation, on all ranks, that there is no
            validation, or that it does not log ``monitor``.
    """

    def __init__(self, monitor: str, target: float) -> None:
        if not 0 < target <= 1:
            raise SettingError("target", target, "use an accuracy above 0 and at most 1, or null")
        self.monitor, self.target = monitor, target
        self._seconds = 0.0
        self._since: float | None = None  # None: the clock stands
        self._steps = 0
        self._reached: dict[str, float] | None = None
        self._counted = True  # from the first step on

    @property
    def result(self) -> dict[str, float]:
        """``target/steps`` and ``target/seconds`` until then, and ``target/reached``: 1, or 0 where it was not; the two
        are then of all training, a lower bound. Nothing where training went on from a checkpoint that was made without
        this target: nobody has looked whether it was reached before.
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
                "there is no validation to reach it in; use data with a val_dataloader and trainer.limit_val_batches "
                "above 0, or target=null",
            )
        self._counted = self._counted and (trainer.global_step == 0 or self._seconds > 0)
        if not self._counted and trainer.is_global_zero:
            print_line(
                f"warning: target={self.target}: the checkpoint that training goes on from was made without this "
                "target, which may have been reached before; nothing is told of it",
                error=True,
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._go_on()

    def on_train_batch_start(self, *_: Any) -> None:
        self._go_on()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._steps = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            there = ", ".join(sorted(trainer.callback_metrics))
            raise AgreedError(
                "target",
                self.target,
                f"validations log no {self.monitor} (callbacks.checkpoint.monitor), but {there}",
            )
        accuracy = trainer.callback_metrics[self.monitor]
        if self._reached is None and accuracy >= accuracy.new_tensor(self.target):  # 19 of 20 in float32 are 0.95
            self._reached = {"steps": trainer.global_step, "seconds": self._seconds}
        self._go_on()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._stop(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(pl_module)

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._since is None else time.monotonic() - self._since
        about = {"monitor": self.monitor, "target": self.target, "counted": self._counted}
        return about | {"steps": self._steps, "seconds": self._seconds + running, "reached": self._reached}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps, self._seconds, self._reached = (state_dict[name] for name in ("steps", "seconds", "reached"))
        same = (state_dict["monitor"], state_dict["target"]) == (self.monitor, self.target)
        self._counted = state_dict["counted"] and (same or not self._steps)

    def _go_on(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def _stop(self, pl_module: pl.LightningModule) -> None:
        if self._since is None:
            return
        if pl_module.device.type == "cuda":  # what is queued is part of it
            torch.cuda.synchronize(pl_module.device)
        self._seconds, self._since = self._seconds + time.monotonic() - self._since, None
