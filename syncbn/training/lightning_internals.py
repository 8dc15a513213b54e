"""The private parts of Lightning that syncbn needs; no other module uses them.

Each was read in the version ``TESTED``. ``tests/training/test_lightning_internals.py`` fails, with the name of the
attribute, when a later Lightning has moved one. A function that replaces a method raises AttributeError where Lightning
has no such method: otherwise Lightning would never call the replacement, and nothing would report it.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Lightning takes seconds to import, and the doctor needs the version alone
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins import LayerSync

TESTED = "2.6.6"  # the newest Lightning that the tests have run with; the doctor reports a newer one


def logged_step(trainer: "pl.Trainer") -> int:
    """The step that loggers get for what is logged now.

    ``_TrainingEpochLoop._batches_that_stepped``, Lightning 2.6.6. ``trainer.global_step`` counts the steps of every
    optimizer, and is one higher in ``on_train_batch_end``, so metrics would be in other rows than Lightning's own.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def accumulates(trainer: "pl.Trainer") -> bool:
    """Whether the step of the current batch continues with another batch.

    ``_TrainingEpochLoop._should_accumulate``, Lightning 2.6.6. ``trainer.accumulate_grad_batches`` alone does not show
    it: the last batch of an epoch ends a step, except under a strategy that accumulates gradients itself.
    """
    return trainer.fit_loop.epoch_loop._should_accumulate()


def another_batch_follows(trainer: "pl.Trainer") -> bool:
    """Whether another batch of this epoch follows the current one, without a validation between the two.

    ``FitLoop._data_fetcher``, ``_TrainingEpochLoop._should_check_val_fx`` and ``_is_training_done``, Lightning 2.6.6.
    No public attribute has the interval of validations in use, which depends on batches, epochs or time. ``done`` of
    the loop also takes ``should_stop`` into account, and logs.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    validates = fetcher is not None and loop._should_check_val_fx(fetcher)
    return not (trainer.is_last_batch or loop._is_training_done or validates)


def call_before_fetch(trainer: "pl.Trainer", callback: Callable[[], None]) -> None:
    """Registers a function that Lightning calls before it fetches a batch, after all hooks of the previous batch.

    ``_TrainingEpochLoop._on_before_fetch``, Lightning 2.6.6: the loop gives it to its fetcher when an epoch begins. No
    hook runs after the last hook of a batch and before the next fetch. The ``__next__`` of our own loader is no
    replacement: resume points are taken with third-party loaders too, and with several loaders at once.
    """
    loop = trainer.fit_loop.epoch_loop
    lightnings = loop._on_before_fetch

    def before_fetch() -> None:
        callback()
        lightnings()

    _replace(loop, "_on_before_fetch", before_fetch)


def epoch_results(trainer: "pl.Trainer") -> Mapping[str, Any]:
    """What ``self.log`` has accumulated in this training epoch: a torchmetrics Metric for each key, with ``meta``.

    ``_TrainingEpochLoop._results``, Lightning 2.6.6. ``trainer.callback_metrics`` has reduced values only, from which
    accumulation cannot continue.
    """
    return trainer.fit_loop.epoch_loop._results


def begin_whole_epoch(trainer: "pl.Trainer", *, fetch_anew: bool) -> None:
    """Has Lightning treat the epoch after a resume as a whole one.

    ``_restarting`` and ``_resuming_from_checkpoint`` of FitLoop, Lightning 2.6.6. Without the first a scheduler's step
    is left out. The public ``restarting`` of FitLoop changes the inner loops too, and ``is_resuming`` cannot be set.

    Args:
        trainer: in ``on_train_start``.
        fetch_anew: for a checkpoint between two epochs. Without it Lightning would end the next epoch before its first
            batch, and would not call ``iter()``, which may draw random numbers.
    """
    loop = trainer.fit_loop
    _replace(loop, "_restarting", False)
    if fetch_anew:
        loop.epoch_loop.restarting = False
        _replace(loop, "_resuming_from_checkpoint", False)


def saves_at_epoch_end(checkpoint: "ModelCheckpoint", trainer: "pl.Trainer") -> bool:
    """Whether this callback saves when an epoch of training ends, rather than with validations.

    ``ModelCheckpoint._should_save_on_train_epoch_end``, Lightning 2.6.6. The argument ``save_on_train_epoch_end`` is
    None by default, and then the answer depends on how often the trainer validates.
    """
    return checkpoint._should_save_on_train_epoch_end(trainer)


def layer_sync(trainer: "pl.Trainer") -> "LayerSync | None":
    """The plugin that synchronizes layers while Lightning fits.

    ``ParallelStrategy._layer_sync``, Lightning 2.6.6. The trainer has no public attribute for the plugins that it got,
    and ``sync_batchnorm=True`` makes one without any.
    """
    found: LayerSync | None = getattr(trainer.strategy, "_layer_sync", None)  # a strategy for one device has none
    return found


def leave_signals_alone(trainer: "pl.Trainer") -> None:
    """Keeps Lightning from handling SIGTERM, and from the broadcast about it before every step.

    ``register_signal_handlers`` of ``Trainer._signal_connector`` and ``_TrainingEpochLoop._broadcast_sigterm_tensor``,
    Lightning 2.6.6. Lightning's handler saves a checkpoint from within, where ranks wait for one another
    (https://github.com/Lightning-AI/pytorch-lightning/issues/21406). A SLURMEnvironment can turn requeuing off, not the
    handler.
    """
    _replace(trainer._signal_connector, "register_signal_handlers", lambda: None)
    _replace(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", lambda: None)


def _replace(owner: Any, name: str, value: Any) -> None:
    """``setattr`` for an attribute that exists already."""
    getattr(owner, name)
    setattr(owner, name, value)
