"""What a run shows while it trains: a bar on a terminal, plain lines anywhere else; and how fast it is."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar


def progress() -> pl.Callback:
    """A bar that redraws itself where there is a terminal to do it on, else a line an epoch (logs of cluster jobs)."""
    return _Bar() if sys.stdout.isatty() else LogLines()


class _Bar(RichProgressBar):
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class LogLines(pl.Callback):
    """One line an epoch, and within long epochs one every ``seconds``.

    Args:
        seconds: the most time between two lines.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self._last = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if time.monotonic() - self._last > self.seconds:
            self._last = time.monotonic()
            self._line(trainer, f"batch {trainer.fit_loop.batch_idx + 1}/{trainer.num_training_batches}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer, f"step {trainer.global_step}")

    def _line(self, trainer: pl.Trainer, where: str) -> None:
        # At the end of an epoch this merges the metrics over the ranks: it is a message, so every rank must ask.
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            epoch = f"epoch {trainer.current_epoch + 1:>{len(str(trainer.max_epochs))}}/{trainer.max_epochs}"
            chosen = sorted(name for name in numbers if not name.startswith("lr-") and not name.endswith("_step"))
            print(epoch, where, *(f"{name} {numbers[name]:.4f}" for name in chosen), sep="  ", flush=True)


class Throughput(pl.Callback):
    """Samples per second over all devices in training, validation and the first batch (the warm-up) left out.

    Args:
        global_batch_size: samples per batch over all devices.

    Attributes:
        batches: how many were trained on in this process.
    """

    def __init__(self, global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self.batches = 0
        self._seconds, self._since = 0.0, 0.0

    @property
    def images_per_second(self) -> float:
        """0 where there was one batch or none."""
        return (self.batches - 1) * self.global_batch_size / self._seconds if self._seconds else 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.monotonic()
        self.batches += 1
        if self.batches > 1:
            self._seconds += now - self._since
        self._since = now
