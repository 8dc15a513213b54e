"""Creates the loggers of a rank, resumes them, and ends them: ``metrics.csv`` and those that the settings choose.

Only rank 0 writes. The names of the functions are those of :mod:`syncbn.training.loggers.wandb_logger` for W&B alone.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import DictConfig, OmegaConf

from syncbn.training.config.compare import flat
from syncbn.training.config.plan import Plan
from syncbn.training.errors import SettingError
from syncbn.training.loggers import chosen, wandb_logger
from syncbn.training.loggers.csv_logger import MetricsFile, first_step
from syncbn.training.loggers.ending import Ending, Store
from syncbn.training.loggers.guard import guarded, warn
from syncbn.training.run_directory import record

STORES = ("tensorboard", "mlflow")


def build(plan: Plan, rank: int) -> list[Logger]:
    """Create the loggers of one rank.

    Raises:
        SettingError: a logger refuses the run, or its server refuses it.
    """
    group = plan.cfg.logger
    loggers: list[Logger] = [MetricsFile(plan.run_dir)]
    if chosen.uses_wandb(group):
        loggers.append(wandb_logger.build(plan.cfg, plan.run_dir, rank))
    loggers += [_store(name, plan, rank) for name in STORES if group.get(name) is not None]
    loggers += [_custom(name, plan) for name in chosen.custom(group)]
    return loggers


def _store(name: str, plan: Plan, rank: int) -> Logger:
    if rank != 0:
        return DummyLogger()
    try:
        if name == "tensorboard":
            from syncbn.training.loggers.tensorboard_logger import TensorBoard

            return guarded(TensorBoard(plan), name, ("resume", "end"))
        from syncbn.training.loggers.mlflow_logger import MLflow

        return guarded(MLflow(plan), name, ("resume", "end"))
    except Exception as error:  # a run that has trained before continues without it
        if record.read(plan.run_dir, "run").get("attempt", 1) == 1:
            raise
        warn(name, error)
        return DummyLogger()


def _custom(name: str, plan: Plan) -> Logger:
    """A custom logger. As in Lightning each rank has one; Lightning's own write on rank 0 only."""
    node = plan.cfg.logger[name]
    try:
        logger = instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:300]
        raise SettingError(f"logger.{name}._target_", node["_target_"], reason) from error
    if not isinstance(logger, Logger):
        hint = "this is no logger of Lightning; use a class derived from lightning.pytorch.loggers.Logger"
        raise SettingError(f"logger.{name}._target_", node["_target_"], hint)
    guarded(logger, name)
    logger.log_hyperparams(flat(OmegaConf.to_container(plan.cfg)))
    return logger


def position(trainer: pl.Trainer) -> dict[str, int]:
    """The position in ``metrics.csv``, as plain data for a checkpoint; empty on ranks other than 0."""
    files = [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
    return {"rows": files[0].rows()} if files and trainer.is_global_zero else {}


def restore_position(trainer: pl.Trainer, position: Mapping[str, int]) -> None:
    """Cut the metrics back to ``position``; to be called before training begins or resumes.

    Rows that were logged later for earlier steps are kept. The metrics of an epoch, for example, are logged after the
    checkpoint at its end.
    """
    if not trainer.is_global_zero or "rows" not in position:
        return
    for file in (logger for logger in trainer.loggers if isinstance(logger, MetricsFile)):
        file.cut(position["rows"], first_step(trainer))
    for logger in trainer.loggers:
        if isinstance(logger, wandb_logger.RunLogger):
            logger.catch_up()
        elif isinstance(logger, Store):
            logger.resume(first_step(trainer))


def finish(cfg: DictConfig, loggers: list[Logger] | None, ending: Ending) -> None:
    """Log how the run has ended, with its pictures and best checkpoint, and close all loggers; for rank 0 only."""
    wandb_logger.finish(cfg, ending)
    for logger in loggers or ():
        if isinstance(logger, Store):
            logger.end(ending)
        elif not isinstance(logger, MetricsFile | wandb_logger.RunLogger):
            logger.finalize("success" if ending.status == "finished" else "failed")


def mark_failed(cfg: DictConfig, run_dir: Path, status: str) -> None:
    """Record in the loggers of a rank 0 that has died how the run has ended, from another process.

    Raises:
        SettingError: W&B's server does not answer.
    """
    if record.read(run_dir, "tensorboard").get("finished") is False:
        from syncbn.training.loggers import tensorboard_logger

        with suppress(Exception):  # the disk is full, or somebody has removed the directory
            tensorboard_logger.mark(run_dir, status)
    if record.read(run_dir, "mlflow").get("finished") is False:
        from syncbn.training.loggers import mlflow_logger

        with suppress(Exception):  # the server is gone: training has warned of that
            mlflow_logger.mark(run_dir, status)
    if record.read(run_dir, chosen.WANDB).get("finished") is False:
        wandb_logger.mark_failed(cfg, run_dir)
