"""Tests on the training images, and computes the generalization gap to the test images."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl

from syncbn.training.data.batches import Batches
from syncbn.training.data.loaders import BatchLoader, TrainLoader, exact_loader, second_loader, training_loader
from syncbn.training.errors import AgreedError
from syncbn.training.evaluation.repeat_test import Metrics, retest


def evaluate_training_images(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    test: Mapping[str, float],
    *,
    datamodule: pl.LightningDataModule,
    **options: Any,
) -> Metrics:
    """Repeat the test on the training images, each of them once, in evaluation mode.

    The images and labels are those of training: augmented, if training augments (with the same random draws every
    time), and with label noise, if there is any.

    Args:
        trainer, pl_module, options: see :func:`~.repeat_test.retest`.
        test: the metrics of the test.
        datamodule: the data module; its ``test_dataloader`` is replaced during the call.

    Returns:
        ``fit/acc``, ``fit/loss`` and the other metrics of the test under ``fit/``, and ``fit/gap``, the test loss minus
        the loss on the training images. They are also logged.

    Raises:
        AgreedError: no second loader can be made of the training data.
    """

    def gap(found: Metrics) -> Metrics:
        known = "test/loss" in test and "fit/loss" in found
        return {"fit/gap": test["test/loss"] - found["fit/loss"]} if known else {}

    datamodule.test_dataloader = lambda: _each_once(trainer)  # type: ignore[method-assign]
    try:
        return retest(trainer, pl_module, "fit", gap, datamodule=datamodule, **options)
    finally:
        del datamodule.test_dataloader  # the instance attribute; the method of the class is visible again


class RefuseUnfit(pl.Callback):
    """Raises before training if :func:`evaluate_training_images` cannot make a second loader of the training data."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _second_loader(trainer)


def _second_loader(trainer: pl.Trainer) -> TrainLoader:
    return second_loader(training_loader(trainer), partial(AgreedError, "fit", True), "use fit=false")


def _each_once(trainer: pl.Trainer) -> BatchLoader:
    """A loader that yields each training image once."""
    loader = _second_loader(trainer)
    batches, sampler = loader.dataset, loader.sampler
    assert isinstance(batches, Batches)
    options = {name: getattr(loader, name) for name in ("num_workers", "pin_memory", "worker_init_fn")}
    size = sampler.global_batch // sampler.num_replicas
    return exact_loader(batches.dataset, size, collate_fn=batches.collate, **options)
