"""Shows training progress, as a progress bar on a terminal and as plain lines elsewhere, and measures throughput."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.data import extract_batch_size

from syncbn.training.console import print_line
from syncbn.training.data.loaders import global_samples


def shows_bar(trainer: dict[str, Any]) -> bool:
    """Whether to show a progress bar: as ``enable_progress_bar`` of ``trainer``, by default if stdout is a terminal."""
    return bool(trainer.get("enable_progress_bar", sys.stdout.isatty()))


class MergeMetrics(pl.Callback):
    """Computes metrics over all ranks at the end of each stage; must be the first callback.

    Lightning computes a metric over the ranks when ``trainer.callback_metrics`` is first read, which is a collective.
    A progress bar reads it on rank 0 only. Its collective would then be matched with whichever collective the other
    ranks call next. This callback reads it on all ranks first.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _ = trainer.callback_metrics

    on_validation_end = on_test_end = on_train_epoch_end


class Bar(RichProgressBar):
    """Lightning's progress bar without ``v_num``, the logger's version number: our loggers have no versions."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class LogLines(pl.Callback):
    """Prints one line per epoch, and in long epochs another line every ``seconds``, checked after each batch."""

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.monotonic()

    on_train_epoch_start = on_train_start

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if time.monotonic() - self._last > self.seconds:
            self._last = time.monotonic()
            self._line(trainer, f"batch {trainer.fit_loop.batch_idx + 1}/{trainer.num_training_batches}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer, f"step {trainer.global_step}")

    def _line(self, trainer: pl.Trainer, where: str) -> None:
        if trainer.is_global_zero:
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            epoch = f"epoch {trainer.current_epoch + 1:>{len(str(trainer.max_epochs))}}/{trainer.max_epochs}"
            chosen = sorted(name for name in numbers if not name.startswith("lr-") and not name.endswith("_step"))
            print_line("  ".join([epoch, where, *(f"{name} {numbers[name]:.4f}" for name in chosen)]))


class Throughput(pl.Callback):
    """Measures samples per second over all devices in training, without validation and the first batch (the warm-up).

    Attributes:
        batches: number of training batches of this rank in this process.
        epochs_before: number of epochs that were finished when this process began to train.
    """

    def __init__(self) -> None:
        self.batches, self.epochs_before, self._samples = 0, 0, 0
        self._seconds, self._since = 0.0, 0.0

    @property
    def images_per_second(self) -> float:
        """Samples per second; 0 with fewer than two batches."""
        return self._samples / self._seconds if self._seconds else 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs_before = trainer.current_epoch

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # With all epochs trained before this process, Lightning skips the loop and never calls on_train_start.
        if not self.batches:
            self.epochs_before = trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    on_validation_end = on_train_epoch_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self.batches += 1
        if self.batches > 1:
            self._seconds += now - self._since
            self._samples += global_samples(trainer) or extract_batch_size(batch) * trainer.world_size
        self._since = now
