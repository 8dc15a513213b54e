"""Population statistics ("precise batch norm", Wu & Johnson 2021): measured with fixed weights, in place of averages.

The running statistics are an average over batches that other weights saw, the last of them most. Here the weights stand
still: over ``k`` batches, on all ranks, each batch norm layer's own input is added up while the layers before it
normalize as they do in training. With the batches' means ``mu_B`` and variances ``var_B`` the population has the mean
``E[mu_B]`` and the variance ``E[mu_B^2 + var_B] - E[mu_B]^2`` (Wu & Johnson 2021, section 3.2), the expectation taken
over samples. So it does not matter how the samples were cut into batches, groups or ghost batches.
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

FROZEN = "frozen_norms"  # in a checkpoint: the layers that training left in evaluation mode


class PreciseStatistics(pl.Callback):
    """Measures population statistics (:func:`precise_statistics`) before each validation, or when training ends.

    As detectron2's hook of this name: what is validated, and then saved as the best checkpoint, has them. The running
    averages go on from them in training, which does not look at them. The batches come from a loader of its own over
    the training data, in the order that the epoch has, so training's loaders, random numbers and resume points are
    left as they are.

    Args:
        num_batches: of each rank. Where an epoch has fewer, the next one's order follows.
        every_n_epochs: before the validations of each n-th epoch; None for the end of the last epoch alone, after its
            validations and before its checkpoints are written. What says then which epoch is the last is max_epochs,
            max_steps, and ``trainer.should_stop``. Checkpoints of earlier epochs have the running averages.
        before_test: also when a test begins, with the weights that are tested.
        only: which layers, as for :func:`syncbn.convert`; names begin at the LightningModule.
        batches: called without arguments, gives other batches to measure.
        forward: called with the LightningModule and a batch, runs it; by default the module is called with the batch,
            or its first part.

    Raises:
        SettingError: a number below 1; when training begins, with ``every_n_epochs=None``, an EarlyStopping, which may
            end training after the last epoch's end has been dealt with, or a ModelCheckpoint that saves with
            validations, before it; when it measures, training data that it cannot make a loader of its own for, or
            what :func:`precise_statistics` raises.
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
        self._measured_at: int | None = None  # the step

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._look_for_frozen(pl_module)

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
        self._look_for_frozen(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self.every_n_epochs is None:
            return
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning calls ModelCheckpoint after all others here; a resume point is written later still.
        if self.every_n_epochs is None and _is_last_epoch(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._measured_at != trainer.global_step:
            self._measure(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before_test:
            with _synchronized(trainer, pl_module):
                self._measure(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._frozen |= set(checkpoint.get(FROZEN, ()))

    def _look_for_frozen(self, pl_module: pl.LightningModule) -> None:
        """Layers that training leaves in evaluation mode; in an evaluation all are."""
        if pl_module.training:
            self._frozen = {name for name, layer in batch_norms(pl_module) if not layer.training}

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        thawed = {layer for name, layer in batch_norms(pl_module, self.only) if name not in self._frozen}

        def run(batch: Any) -> None:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = _hook_owner(trainer, pl_module).on_before_batch_transfer(batch, dataloader_idx=0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
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
    """Whether the epoch that is being ended is; ``fit_loop.done`` would say, but counts while it does."""
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current.processed  # type: ignore[attr-defined]  # the tracker is one that has it
    limits = (loop.epoch_loop.global_step, loop.max_steps), (epochs, loop.max_epochs)
    if any(most is not None and -1 != most <= reached for reached, most in limits):
        return True
    least = (loop.epoch_loop.global_step, loop.min_steps), (epochs, loop.min_epochs)
    return trainer.should_stop and all(reached >= (fewest or 0) for reached, fewest in least)


def _hook_owner(trainer: pl.Trainer, pl_module: pl.LightningModule) -> pl.LightningModule | pl.LightningDataModule:
    """Whose ``on_before_batch_transfer`` Lightning 2.6 calls: the datamodule's, if it overrides the hook."""
    datamodule: pl.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    overrides = datamodule is not None and is_overridden("on_before_batch_transfer", datamodule)
    return datamodule if datamodule is not None and overrides else pl_module


def test_precisely(trainer: Any, pl_module: pl.LightningModule, num_batches: int, **options: Any) -> dict[str, Any]:
    """The test once more, with population statistics over so many training batches.

    Args:
        trainer: it has fitted and tested this module.
        options: further arguments of ``trainer.test``.

    Returns:
        What the test gives, ``precise/acc`` for ``test/acc`` and so on; it is logged under these names.
    """
    callback = PreciseStatistics(num_batches, every_n_epochs=None, before_test=True)
    trainer.callbacks.append(callback)
    try:
        return retest(trainer, pl_module, "precise", **options)
    finally:
        trainer.callbacks.remove(callback)


@contextmanager
def _synchronized(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """The layers as they are in training: Lightning synchronizes them while it fits alone."""
    sync = lightning_internals.layer_sync(trainer)
    if sync is not None:
        sync.apply(pl_module)
    try:
        yield
    finally:
        if sync is not None:
            sync.revert(pl_module)
