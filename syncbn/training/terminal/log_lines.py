"""Prints progress as plain lines, for files, pipes, notebooks and terminals that cannot move the cursor."""

import math
import os
import sys
import time
from typing import Any

import lightning.pytorch as pl

from syncbn.training.console import print_line
from syncbn.training.terminal import epoch_line
from syncbn.training.terminal.epoch_line import Pace

UNKNOWN = ("", "dumb", "unknown")  # values of TERM for terminals without a cursor that moves


def shows_bar(trainer: dict[str, Any]) -> bool:
    """Whether to show a progress bar: as ``enable_progress_bar`` of ``trainer``, by default if a terminal can show it.

    A notebook's ``!command`` runs in a terminal too, whose output it keeps, and every state of a bar with it.
    """
    able = sys.stdout.isatty() and os.environ.get("TERM", "") not in UNKNOWN and "JPY_PARENT_PID" not in os.environ
    return bool(trainer.get("enable_progress_bar", able))


class LogLines(pl.Callback):
    """Prints one line per epoch, and in long epochs another line every ``seconds``, checked after each batch."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds, self._last, self._pace = seconds, 0.0, Pace()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._pace.batch(trainer)
        if time.monotonic() - self._last > self.seconds:
            self._last, length = time.monotonic(), trainer.num_training_batches
            of = "" if math.isinf(length) else f"/{length}"
            self._line(trainer, f"batch {trainer.fit_loop.batch_idx + 1}{of}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer, f"step {trainer.global_step}")
        self._pace.epoch(trainer)

    def _line(self, trainer: pl.Trainer, where: str) -> None:
        if trainer.is_global_zero:
            print_line(full(trainer, where, self._pace))


def full(trainer: pl.Trainer, where: str, pace: Pace) -> str:
    """The line with everything that is known, as in ``train.log``."""
    words = [*epoch_line.numbers(trainer.callback_metrics), *epoch_line.pace_words(trainer, pace)]
    return "  ".join([epoch_line.epoch_name(trainer), where, *words])
