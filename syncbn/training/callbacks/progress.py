"""Measures throughput, and computes metrics over all ranks before one rank reads them."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.data import extract_batch_size

from syncbn.training.data.loaders import global_samples


class MergeMetrics(pl.Callback):
    """Computes metrics over all ranks at the end of each stage; must be the first callback.

    Lightning computes a metric over the ranks when ``trainer.callback_metrics`` is first read, which is a collective.
    A progress bar reads it on rank 0 only. Its collective would then be matched with whichever collective the other
    ranks call next. This callback reads it on all ranks first.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _ = trainer.callback_metrics

    on_validation_end = on_test_end = on_train_epoch_end


class Throughput(pl.Callback):
    """Measures samples per second over all devices in training, without validation and the first batch (the warm-up).

    Attributes:
        batches: number of training batches of this rank in this process.
        epochs_before: number of epochs that were finished when this process began to train.
        samples, seconds: what the measurement is made of.
    """

    def __init__(self) -> None:
        self.batches, self.epochs_before, self.samples = 0, 0, 0
        self.seconds, self._since = 0.0, 0.0

    @property
    def images_per_second(self) -> float:
        """Samples per second; 0 with fewer than two batches."""
        return self.samples / self.seconds if self.seconds else 0.0

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
            self.seconds += now - self._since
            self.samples += global_samples(trainer) or extract_batch_size(batch) * trainer.world_size
        self._since = now
