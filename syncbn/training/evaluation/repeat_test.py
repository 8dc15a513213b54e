"""Repeats the test under another name: with other statistics, or on other images."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from syncbn.training.lightning_internals import logged_step

Metrics = dict[str, float]


def retest(
    trainer: Any,
    pl_module: pl.LightningModule,
    name: str,
    more: Callable[[Metrics], Metrics] = lambda found: {},
    **options: Any,
) -> Metrics:
    """Repeat the test under another name.

    Args:
        trainer, pl_module: a trainer that has fitted and tested this module.
        name: replaces ``test`` in the names of the metrics.
        more: computes further metrics, with full names, from the renamed ones.
        options: further arguments of ``trainer.test``.

    Returns:
        The metrics of the test with ``NAME/`` in place of ``test/``, and those of ``more``; they are also logged.
    """
    loggers, trainer.loggers = trainer.loggers, []  # Lightning would log them as test/, over the first test's metrics
    try:
        metrics = trainer.test(pl_module, verbose=False, **options)
    finally:
        trainer.loggers = loggers
    found = {f"{name}/{key.removeprefix('test/')}": value for each in metrics for key, value in each.items()}
    found |= more(found)
    for logger in loggers:
        logger.log_metrics(found, step=logged_step(trainer))  # the same step as the first test
        logger.save()
    return found
