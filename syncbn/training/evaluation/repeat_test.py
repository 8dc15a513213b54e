"""The test again: once it has been made, with other statistics, other images, or on the training images."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from syncbn.training.lightning_internals import logged_step

Numbers = dict[str, float]


def retest(
    trainer: Any,
    pl_module: pl.LightningModule,
    name: str,
    more: Callable[[Numbers], Numbers] = lambda found: {},
    **options: Any,
) -> Numbers:
    """Tests once more, under another name.

    Args:
        trainer: it has fitted and tested this module.
        name: in place of ``test`` in the names of the metrics.
        more: what follows from them, by whole names.
        options: further arguments of ``trainer.test``.

    Returns:
        What the test gives, ``NAME/acc`` for ``test/acc`` and so on; it is logged under these names.
    """
    loggers, trainer.loggers = trainer.loggers, []  # the names are the first test's
    try:
        metrics = trainer.test(pl_module, verbose=False, **options)
    finally:
        trainer.loggers = loggers
    found = {f"{name}/{key.removeprefix('test/')}": value for each in metrics for key, value in each.items()}
    found |= more(found)
    for logger in loggers:
        logger.log_metrics(found, step=logged_step(trainer))  # the step of the first
        logger.save()
    return found
