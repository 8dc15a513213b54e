"""How well the training images themselves are known: the test on them, and the generalization gap."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl

from syncbn.training.data.loaders import Batches, BatchLoader, TrainLoader, exact_loader, own_loader, training_loader
from syncbn.training.errors import AgreedError
from syncbn.training.evaluation.repeat_test import Numbers, retest


def test_fit(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    test: Mapping[str, float],
    *,
    datamodule: pl.LightningDataModule,
    **options: Any,
) -> Numbers:
    """The test once more, on the training images: each of them once, in evaluation mode.

    They are as they were trained on: augmented where that is done (a draw that is the same every time), and with those
    labels, also where some were made wrong.

    Args:
        trainer: it has fitted and tested this module.
        test: what came out of the test.
        options: further arguments of ``trainer.test``.

    Returns:
        ``fit/acc``, ``fit/loss`` and so on, and ``fit/gap``, the loss of the test less that on the training images. It
        is logged under these names.

    Raises:
        SettingError: the training data cannot be gone through in this way.
    """

    def gap(found: Numbers) -> Numbers:
        known = "test/loss" in test and "fit/loss" in found
        return {"fit/gap": test["test/loss"] - found["fit/loss"]} if known else {}

    datamodule.test_dataloader = lambda: _each_once(trainer)  # type: ignore[method-assign]
    try:
        return retest(trainer, pl_module, "fit", gap, datamodule=datamodule, **options)
    finally:
        del datamodule.test_dataloader  # the class's own again


class RefuseUnfit(pl.Callback):
    """Refuses training data that :func:`test_fit` could not go through, before they are trained on."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _own_loader(trainer)


def _own_loader(trainer: pl.Trainer) -> TrainLoader:
    return own_loader(training_loader(trainer), partial(AgreedError, "fit", True), "use fit=false")


def _each_once(trainer: pl.Trainer) -> BatchLoader:
    own = _own_loader(trainer)
    batches, sampler = own.dataset, own.sampler
    assert isinstance(batches, Batches)
    options = {name: getattr(own, name) for name in ("num_workers", "pin_memory", "worker_init_fn")}
    size = sampler.global_batch // sampler.num_replicas
    return exact_loader(batches.dataset, size, collate_fn=batches.collate, **options)
