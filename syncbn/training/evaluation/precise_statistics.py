"""Replaces running statistics by population statistics measured with fixed weights ("precise batch norm").

Running statistics are a moving average over batches that were computed with earlier weights; recent batches weigh most.
Here the weights are fixed: over ``k`` batches on all ranks, the input of each batch norm layer is summed while the
layers before it normalize as in training. With the batches' means ``mu_B`` and variances ``var_B``, the population has
the mean ``E[mu_B]`` and the variance ``E[mu_B^2 + var_B] - E[mu_B]^2`` (Wu & Johnson 2021, section 3.2), where the
expectation is over samples. The result therefore does not depend on how the samples are split into batches, groups or
ghost batches.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden

from syncbn.nn import rng
from syncbn.nn.conversion.convert import Only, batch_norms
from syncbn.nn.population_statistics import MeasurementError, model_input, precise_statistics
from syncbn.training import lightning_internals
from syncbn.training.data.loaders import training_batches
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.evaluation.repeat_test import retest

FROZEN = "frozen_norms"  # key in a checkpoint: names of the layers that were in evaluation mode during training


class PreciseStatistics(pl.Callback):
    """Measures population statistics (:func:`precise_statistics`) before each validation, or when training ends.

    Like detectron2's hook of this name, it changes the statistics before validation, so the validated model and the
    best checkpoint have them. Training then continues the running averages from them; training itself does not use
    running statistics. The batches come from a separate loader over the training data, in the order of the epoch, so
    the training loader, the random state and resume points are not affected.

    Args:
        num_batches: number of batches on each rank. If an epoch has fewer, the next epoch's order follows.
        every_n_epochs: measure before the validations of every n-th epoch; None to measure only at the end of the last
            epoch, after its validations and before its checkpoints are written. The last epoch is then determined by
            max_epochs, max_steps and ``trainer.should_stop``. Checkpoints of earlier epochs have the running averages.
        before_test: also measure when a test begins, with the weights of the test.
        only: selects layers, as for :func:`syncbn.convert`; names begin at the LightningModule.
        batches: called without arguments, returns other batches to measure.
        forward: called with the LightningModule and a batch, runs the forward pass; by default the module is called
            with the batch, or with the first part of the batch.

    Raises:
        SettingError: a number below 1; from a measurement, if no second loader can be made of the training data, or
            :func:`precise_statistics` raises.
        AgreedError: when training begins, with ``every_n_epochs=None``: an EarlyStopping, which may end training after
            this callback has handled the epoch's end; or a ModelCheckpoint that saves with validations, which is
            before the measurement.
    """

    def __init__(
        self,
        num_batches: int = 200,
        *,
        every_n_epochs: int | None = 1,
        before_test: bool = False,
        only: Only = None,
        batches: Callable[[], Iterable[Any]] | None = None,
        forward: Callable[[pl.LightningModule, Any], Any] | None = None,
    ) -> None:
        for name, value in (("num_batches", num_batches), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise SettingError(f"PreciseStatistics.{name}", value, "use a whole number, 1 or more")
        self.num_batches, self.every_n_epochs, self.before_test = num_batches, every_n_epochs, before_test
        self.only, self.batches, self.forward = only, batches, forward
        self._frozen: set[str] = set()
        self._measured_at: int | None = None  # the global step of the last measurement

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._find_frozen(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for each in trainer.callbacks if self.every_n_epochs is None else ():  # type: ignore[attr-defined]
            late = isinstance(each, ModelCheckpoint) and not lightning_internals.saves_at_epoch_end(each, trainer)
            if late or isinstance(each, EarlyStopping):
                why = "saves with validations, before the last epoch's end" if late else "may end training at any epoch"
                raise AgreedError(
                    "PreciseStatistics.every_n_epochs",
                    None,
                    f"{type(each).__name__} {why}, so the last checkpoint would not have the statistics; use "
                    "every_n_epochs=1",
                )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._find_frozen(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self.every_n_epochs is None:
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning calls ModelCheckpoint after all other callbacks in this hook; resume points are written even later.
        if self.every_n_epochs is None and _is_last_epoch(trainer):
            self.measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._measured_at != trainer.global_step:
            self.measure(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before_test:
            with _synchronized(trainer, pl_module):
                self.measure(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._frozen |= set(checkpoint.get(FROZEN, ()))

    def _find_frozen(self, pl_module: pl.LightningModule) -> None:
        """Record which layers are frozen: in evaluation mode although the module is in training mode."""
        if pl_module.training:  # in an evaluation every layer is in evaluation mode
            self._frozen = {name for name, layer in batch_norms(pl_module) if not layer.training}

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the running statistics of the layers that are not frozen by those of ``num_batches`` batches."""
        thawed = {layer for name, layer in batch_norms(pl_module, self.only) if name not in self._frozen}

        def run(batch: Any) -> None:
            batch = prepared(trainer, pl_module, batch)
            with trainer.precision_plugin.train_step_context():
                pl_module(model_input(batch)) if self.forward is None else self.forward(pl_module, batch)

        with rng.untouched():
            batches = training_batches(trainer) if self.batches is None else self.batches()
            try:
                precise_statistics(
                    pl_module, batches, self.num_batches, only=lambda name, layer: layer in thawed, forward=run
                )
            except MeasurementError as error:
                subject, _, wrong = str(error).partition(": ")
                raise SettingError(subject, hint=wrong) from error
        self._measured_at = trainer.global_step


def _is_last_epoch(trainer: pl.Trainer) -> bool:
    """Whether the epoch that is ending is the last one.

    ``fit_loop.done`` computes the same, but reading it logs a line and sets a progress counter (Lightning 2.6).
    """
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # the tracker is one that has it
    limits = (loop.epoch_loop.global_step, loop.max_steps), (epochs, loop.max_epochs)
    if any(most is not None and -1 != most <= reached for reached, most in limits):
        return True
    least = (loop.epoch_loop.global_step, loop.min_steps), (epochs, loop.min_epochs)
    return trainer.should_stop and all(reached >= (fewest or 0) for reached, fewest in least)


def prepared(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Any:
    """A batch of a loader as ``training_step`` gets it: in the precision of training, on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = _hook_owner(trainer, pl_module).on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _hook_owner(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule | pl.LightningDataModule:
    """The object whose ``on_before_batch_transfer`` Lightning 2.6 calls: the datamodule, if it overrides the hook."""
    datamodule: pl.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    overrides = datamodule is not None and is_overridden("on_before_batch_transfer", datamodule)
    return datamodule if datamodule is not None and overrides else pl_module


def evaluate_with_precise_statistics(
    trainer: Any, pl_module: pl.LightningModule, num_batches: int, **options: Any
) -> dict[str, Any]:
    """Repeat the test with population statistics over ``num_batches`` training batches on each rank.

    The metrics have ``precise/`` in place of ``test/``. For the arguments see :func:`~.repeat_test.retest`.
    """
    callback = PreciseStatistics(num_batches, every_n_epochs=None, before_test=True)
    trainer.callbacks.append(callback)
    try:
        return retest(trainer, pl_module, "precise", **options)
    finally:
        trainer.callbacks.remove(callback)


@contextmanager
def _synchronized(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Synchronize the layers as in training: Lightning applies its LayerSync plugin only while fitting."""
    sync = lightning_internals.layer_sync(trainer)
    if sync is None:
        yield
        return
    sync.apply(pl_module)
    try:
        yield
    finally:
        sync.revert(pl_module)
