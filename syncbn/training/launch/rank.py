"""Runs one rank: builds model, data and trainer from the settings, fits, tests, and writes the results on rank 0."""

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torchmetrics.utilities import prints

from syncbn.training.callbacks import monitored_metric
from syncbn.training.callbacks.best_metric import BestMetric
from syncbn.training.callbacks.compare_ranks import CompareRanks
from syncbn.training.callbacks.gradient_monitor import GradientMonitor
from syncbn.training.callbacks.leak_meter import LeakMeter
from syncbn.training.callbacks.non_finite import stopper
from syncbn.training.callbacks.progress import MergeMetrics, Throughput
from syncbn.training.callbacks.statistics_monitor import StatisticsMonitor
from syncbn.training.callbacks.time_to_target import TimeToTarget
from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.atomic_io import AtomicCheckpointIO
from syncbn.training.checkpoint.resume_points import ResumePoints
from syncbn.training.config import validate_evaluation
from syncbn.training.config.plan import Plan
from syncbn.training.console import print_line
from syncbn.training.distributed import ddp_strategy, unresponsive_ranks
from syncbn.training.distributed.signals import Stopped
from syncbn.training.errors import SettingError
from syncbn.training.evaluation import class_accuracy, generalization_gap, precise_statistics
from syncbn.training.evaluation.adapt_statistics import AdaptStatistics
from syncbn.training.evaluation.corruption_suite import CorruptionSuite
from syncbn.training.evaluation.prediction_record import PredictionRecord
from syncbn.training.launch import preflight
from syncbn.training.lightning_internals import leave_signals_alone
from syncbn.training.loggers import run_loggers
from syncbn.training.loggers.ending import Ending
from syncbn.training.metrics.evaluation_metrics import EvaluationMetrics
from syncbn.training.metrics.peak_memory import peak_memory
from syncbn.training.models.build import build
from syncbn.training.network import data_mismatch, half_precision, prepare
from syncbn.training.network.freeze import FreezeNorm
from syncbn.training.network.utilization import Utilization
from syncbn.training.norm import replace, simulated_devices, trainer_parts
from syncbn.training.optimization import early_stop, find_lr, weight_average
from syncbn.training.plots import of_test
from syncbn.training.plots.curves import write_curves
from syncbn.training.run_directory import record
from syncbn.training.terminal.log_lines import LogLines, shows_bar
from syncbn.training.terminal.model_line import ModelLine
from syncbn.training.terminal.progress_bar import Bar

Kind = TypeVar("Kind", bound=pl.Callback)


def run(plan: Plan) -> None:
    """Trains and tests as the rank that the launcher's environment variables name (``RANK``, ``WORLD_SIZE``, ...).

    The plan is the same on all ranks; :func:`syncbn.training.run_directory.record.begin` has been called.
    """
    _silence_warnings()
    run_dir = plan.run_dir
    if plan.accelerator == "cpu":
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        share = (os.cpu_count() or 1) // plan.devices
        torch.set_num_threads(int(asked) if asked.isdigit() else max(1, share))
    preflight.check(plan)
    rank = int(os.environ["RANK"])
    for of_rank_0 in (rank_zero_only, prints.rank_zero_only):
        # They read RANK when they are imported. The fork server imported them, which is not a rank.
        of_rank_0.rank = rank  # type: ignore[union-attr]
    sessions = _Sessions(plan, rank)
    try:
        with files.explain_mismatch(plan.checkpoint):
            result = _fit_and_test(plan, sessions)
            result["memory"] = peak_memory(plan.accelerator)
    except BaseException as error:
        unresponsive_ranks.report_failure(error)  # before the loggers end, which may take a minute
        stop = isinstance(error, Stopped)
        if rank == 0:
            if plan.cfg.plots and not isinstance(error, SettingError):
                write_curves(run_dir)
            run_loggers.finish(plan.cfg, sessions.loggers, Ending(run_dir, "interrupted" if stop else "failed"))
        if stop and dist.is_initialized():
            dist.destroy_process_group()
        raise
    if rank == 0:
        record.write(run_dir, "result", result)
        if plan.cfg.plots:
            write_curves(run_dir)
        run_loggers.finish(plan.cfg, sessions.loggers, Ending(run_dir, "finished", result))
    # Otherwise gloo's thread may abort the process while it exits. Lightning destroys the group with NCCL only.
    if dist.is_initialized():
        dist.destroy_process_group()


class _Sessions:
    """Builds trainer, module and data of each fit or test from the settings, as in a new process.

    They share the loggers. The trainer of the fit is not reused for a test. Its callbacks, EMA for example, could
    replace the weights that the test has loaded, so the result would not be that of the checkpoint.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan, self._rank = plan, rank
        self.loggers: list[Logger] | None = None
        self._progress: dict[str, Any] | None = None  # of the fit: steps, epochs
        self._fitted: pl.LightningModule | None = None
        self._began = False  # the module of the fit, or of a test alone, was built

    def begin(self, *, suite: bool = True) -> tuple[pl.Trainer, pl.LightningModule, Any]:
        """Builds a new trainer, module and datamodule. ``suite=False`` leaves out the test on corrupted images."""
        module, datamodule = self.parts()
        first = self.loggers is None
        if self.loggers is None:
            self.loggers = run_loggers.build(self._plan, self._rank)
        trainer = build_trainer(self._plan, self.loggers, suite=suite, first=first)
        if self._progress is not None:  # a test is logged at the step and epoch of the fit
            trainer.fit_loop.load_state_dict(self._progress)
        # Lightning does this too, but only after it has loaded the checkpoint: float64 weights would lose precision.
        trainer.precision_plugin.convert_module(module)
        return trainer, module, datamodule

    def parts(self) -> tuple[pl.LightningModule, Any]:
        """Builds a new module and datamodule."""
        cfg = self._plan.cfg
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        data = OmegaConf.masked_copy(cfg.data, [k for k in cfg.data if k != "global_batch_size"])
        if cfg.simulate:
            data.batch_size = self._plan.loader_batch_size
        datamodule = build(data)
        return self._fitted or self._module(), datamodule

    def fitted(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: str | None) -> None:
        """Makes later sessions tests of this fit: of ``checkpoint``, or of the final weights if it is None."""
        self._progress = trainer.fit_loop.state_dict()
        self._fitted = module if checkpoint is None else None

    def _module(self) -> pl.LightningModule:
        cfg = self._plan.cfg
        # A checkpoint that is loaded later has all weights: of the run, or of its best epoch for the test.
        begins, self._began = not self._began and cfg.mode != "test" and self._plan.checkpoint is None, True
        module: pl.LightningModule = build(cfg.module if begins else prepare.without_pretrained(cfg.module))
        replace.prepare_model(module, _plain(cfg.norm))
        prepare.prepare(module, cfg, begins=begins, report=print_line if self._rank == 0 else lambda line: None)
        if self._plan.simulated:
            simulated_devices.refuse(module, self._plan.batches_at_once)
        return module


def _fit_and_test(plan: Plan, sessions: _Sessions) -> dict[str, Any]:
    if plan.cfg.mode == "test":
        return _test(plan, sessions, plan.checkpoint)
    if plan.cfg.mode == "find_lr":
        return _find_lr(plan, sessions)
    trainer, module, datamodule = sessions.begin()
    result = _fit(plan, trainer, module, datamodule)
    if not plan.cfg.test:
        return result
    sessions.fitted(trainer, module, result["checkpoint"])
    del trainer, module, datamodule  # frees the memory of the optimizer
    result["tested"] = "final weights" if result["checkpoint"] is None else "checkpoint"
    return result | _test(plan, sessions, result["checkpoint"])


def build_trainer(plan: Plan, loggers: list[Logger], *, suite: bool = True, first: bool = False) -> pl.Trainer:
    """Builds Lightning's Trainer of a run, with the callbacks and plugins that the plan needs.

    ``suite=False`` leaves out the test on corrupted images; ``first=True`` prints a line about the model.
    """
    cfg, norm_parts = plan.cfg, _norm_parts(plan)
    settings = _trainer_settings(plan)
    bar, settings["enable_progress_bar"] = shows_bar(settings), False  # Lightning's own
    callbacks: list[pl.Callback] = [MergeMetrics(), CompareRanks(plan), *([ModelLine()] if first else [])]
    callbacks += [_resume_points(plan), *norm_parts.callbacks, Throughput()]
    per_rank = cfg.norm.name == "local_mean" and not cfg.simulate
    batches: dict[str, Any] = {"per_rank": per_rank, "batches_at_once": plan.batches_at_once}
    callbacks.append(weight_average.build(_plain(cfg.averaging), cfg.trainer.get("max_epochs"), **batches))
    if cfg.metrics:
        callbacks.append(EvaluationMetrics({str(name): _metric(str(name), each) for name, each in cfg.metrics.items()}))
    callbacks.append(BestMetric(validate_evaluation.target_monitor(cfg)))
    if plan.accelerator == "gpu":
        callbacks.append(Utilization())
    if cfg.fit:
        callbacks.append(generalization_gap.RefuseUnfit())
    if cfg.target is not None:
        callbacks.append(TimeToTarget(validate_evaluation.target_monitor(cfg), cfg.target))
    callbacks += [Bar() if bar else LogLines(), *early_stop.build(cfg)]
    callbacks += map(build, (cfg.callbacks or {}).values())
    if cfg.adapt is not None:
        callbacks.append(AdaptStatistics(**{k: v for k, v in _plain(cfg.adapt).items() if k != "name"}))
    if cfg.corruptions and suite:
        callbacks.append(build(cfg.corruptions))
    trainer = _trainer(plan, norm_parts, callbacks, logger=loggers, **settings)
    leave_signals_alone(trainer)  # ResumePoints handles the signals instead, on all ranks at the same step
    return trainer


def _metric(name: str, settings: DictConfig) -> Any:
    try:
        return build(settings)
    except InstantiationException as error:
        cause = error.__cause__ or error
        hint = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
        raise SettingError(f"metrics.{name}._target_", settings.get("_target_"), hint) from error


def _norm_parts(plan: Plan) -> trainer_parts.Parts:
    cfg = plan.cfg
    return simulated_devices.parts(plan) if cfg.simulate else trainer_parts.parts(_plain(cfg.norm), cfg.seed)


def _trainer_settings(plan: Plan) -> dict[str, Any]:
    """The arguments of Lightning's Trainer from the settings ``trainer``."""
    settings = {name: value for name, value in build(plan.cfg.trainer).items() if value is not None}
    if plan.cfg.simulate:
        settings["accumulate_grad_batches"] = 1  # the loader's batch holds all of them (plan.batches_at_once)
    return settings


def _trainer(plan: Plan, norm_parts: trainer_parts.Parts, callbacks: list[pl.Callback], **settings: Any) -> pl.Trainer:
    cfg, timeout = plan.cfg, timedelta(seconds=plan.cfg.timeouts.collective)
    precision = half_precision.plugins(settings)
    if cfg.freeze and cfg.freeze_norm:
        callbacks = [FreezeNorm(list(cfg.freeze)), *callbacks]
    return pl.Trainer(
        strategy=ddp_strategy.Strategy(cfg.ddp, norm_parts.ddp_arguments, timeout),
        plugins=[TorchElasticEnvironment(), AtomicCheckpointIO(), *norm_parts.plugins, *precision],
        callbacks=callbacks,
        default_root_dir=plan.run_dir,
        **settings,
    )


def _fit(plan: Plan, trainer: pl.Trainer, module: pl.LightningModule, datamodule: Any) -> dict[str, Any]:
    """Trains, and returns the part of ``result.json`` about training."""
    if plan.cfg.ddp.comm_hook == "powersgd" and plan.checkpoint is not None and trainer.is_global_zero:
        print_line("ddp.comm_hook=powersgd: its error feedback is not saved in checkpoints and starts from zero")
    start = time.monotonic()
    state = plan.checkpoint
    if state is not None and plan.restore == "weights":
        files.load_weights(module, state)
        state = None
    monitored_metric.check(module, trainer.callbacks, plan.cfg.callbacks)  # type: ignore[attr-defined]
    with ddp_strategy.explained(trainer.strategy), _explained(plan, trainer):
        trainer.fit(module, datamodule=datamodule, ckpt_path=state, weights_only=True)
    seconds = time.monotonic() - start
    if trainer.is_global_zero:
        class_accuracy.write_data(plan.run_dir, datamodule)
        if (asked := _callback(trainer, EvaluationMetrics)) and asked.confusion is not None:
            of_test.write_validation(plan.run_dir, asked.confusion, datamodule, picture=plan.cfg.plots)
    stops, throughput = stopper(trainer), _callback(trainer, Throughput)
    if trainer.global_step == 0 and not (stops and stops.diverged):
        hint = "no batch was trained on; either the data gives none of that size, or a limit under trainer allows none"
        raise SettingError("data.batch_size", plan.batch_size, hint)
    assert throughput is not None
    result: dict[str, Any] = {
        "seconds": seconds,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "epochs_before": throughput.epochs_before,
        "images_per_second": throughput.images_per_second,
        "checkpoint": getattr(trainer.checkpoint_callback, "best_model_path", None) or None,
        "monitored": _monitored(trainer),
    }
    if (used := _callback(trainer, Utilization)) and (share := used.measure(trainer, throughput.images_per_second)):
        result["mfu"] = share
    result |= early_stop.result(trainer)
    if stops is not None:
        result["diverged"] = int(stops.diverged)
    if (monitor := _callback(trainer, StatisticsMonitor)) and monitor.collectives:
        result["collectives"] = monitor.collectives
    if (gradients := _callback(trainer, GradientMonitor)) and gradients.gradients:
        result["gradients"] = gradients.gradients
    if (leak := _callback(trainer, LeakMeter)) and leak.result:
        result["leak"] = leak.result
    if (target := _callback(trainer, TimeToTarget)) and target.result:
        result["target"] = target.result
    return result


@contextmanager
def _explained(plan: Plan, trainer: pl.Trainer) -> Iterator[None]:
    """Turns an error of Lightning or torch into that of the setting to change, where there is one."""
    try:
        yield
    except (MisconfigurationException, RuntimeError, IndexError) as error:
        found = monitored_metric.explained(error, plan.cfg.callbacks, trainer.callback_metrics)
        if found is None and trainer.global_step == 0:
            found = data_mismatch.explained(error, plan.cfg)
        if found is None:
            raise
        raise found from error


def _find_lr(plan: Plan, sessions: _Sessions) -> dict[str, Any]:
    """Searches a learning rate, and returns the part of ``result.json`` about it. No weights are kept."""
    search, norm_parts = find_lr.RateSearch(**_plain(plan.cfg.find_lr)), _norm_parts(plan)
    module, datamodule = sessions.parts()
    if plan.checkpoint is not None:
        files.load_weights(module, plan.checkpoint)
    settings = _trainer_settings(plan) | {"max_epochs": -1, "max_steps": search.steps, "limit_val_batches": 0}
    settings |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    callbacks = [CompareRanks(plan), ModelLine(), *norm_parts.callbacks, search]
    trainer = _trainer(plan, norm_parts, callbacks, **settings)
    leave_signals_alone(trainer)
    with ddp_strategy.explained(trainer.strategy):
        trainer.fit(module, datamodule=datamodule)
    return {"find_lr": find_lr.report(plan, search.curve, print_line if trainer.is_global_zero else None)}


def _test(plan: Plan, sessions: _Sessions, checkpoint: str | None) -> dict[str, Any]:
    """Tests the checkpoint, or the current weights if it is None, and repeats the test as ``fit`` and others ask."""
    options: dict[str, Any] = {"ckpt_path": checkpoint, "weights_only": True}
    trainer, module, datamodule = sessions.begin()
    recorded = PredictionRecord()
    if plan.cfg.plots:
        trainer.callbacks.append(recorded)  # type: ignore[attr-defined]
    metrics = trainer.test(module, verbose=False, datamodule=datamodule, **options)
    result: dict[str, Any] = {"test": {name: value for each in metrics for name, value in each.items()}}
    if trainer.is_global_zero:
        class_accuracy.write_data(plan.run_dir, datamodule)
        if classes := class_accuracy.write_classes(plan.run_dir, module, datamodule):
            result["classes"] = classes
        if plan.cfg.plots:
            of_test.write_test(plan.run_dir, recorded, datamodule)
    if suite := _callback(trainer, CorruptionSuite):
        result |= suite.result
    if plan.cfg.fit:
        trainer, module, datamodule = sessions.begin(suite=False)
        result["fit"] = generalization_gap.evaluate_training_images(
            trainer, module, result["test"], datamodule=datamodule, **options
        )
    if plan.cfg.precise_batches:  # last, since it changes the running statistics if no checkpoint is loaded
        trainer, module, datamodule = sessions.begin(suite=False)
        batches = plan.cfg.precise_batches // plan.batches_at_once
        result["precise"] = precise_statistics.evaluate_with_precise_statistics(
            trainer, module, batches, datamodule=datamodule, **options
        )
    return result


def _monitored(trainer: pl.Trainer) -> dict[str, float]:
    """The best value of the monitored metric, by its name."""
    checkpoint, best = trainer.checkpoint_callback, _callback(trainer, BestMetric)
    if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor and checkpoint.best_model_score is not None:
        return {checkpoint.monitor: float(checkpoint.best_model_score)}
    return {} if best is None else best.result


def _callback(trainer: pl.Trainer, kind: type[Kind]) -> Kind | None:
    """The trainer's first callback of this class; None if it has none."""
    return next((each for each in trainer.callbacks if isinstance(each, kind)), None)  # type: ignore[attr-defined]


def _resume_points(plan: Plan) -> ResumePoints:
    cfg, run_dir = plan.cfg, plan.run_dir
    return ResumePoints(
        run_dir / "checkpoints",
        global_batch_size=plan.global_batch_size,
        counted_in=plan.position_unit,
        own_buffers=cfg.norm.name == "local_mean",
        timeout=timedelta(seconds=cfg.timeouts.collective),
        on_begin=lambda: record.mark_trained(run_dir),
        **_plain(cfg.resume),
    )


def _silence_warnings() -> None:
    """Silences log lines and warnings of Lightning and torch that need no action; others are still printed."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for about in (
        "does not have many workers",  # data in memory, such as the digits, need none
        "is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",  # a resumed run
        "The dirpath has changed",  # a run that starts from the checkpoint of another run, or tests it
        "LeafSpec.* is deprecated",  # Lightning 2.6 on torch 2.13
        "You're resuming from a checkpoint that ended before the epoch ended",  # resume_points.py handles it
        "The `srun` command is available on your system but is not used",  # not every run on a cluster is a Slurm job
        "You're using the WeightAveraging callback, but loading a checkpoint outside the 'fit' stage",  # in the test
    ):
        warnings.filterwarnings("ignore", f".*{about}")


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return dict(OmegaConf.to_container(cfg))  # type: ignore[arg-type]  # a DictConfig's container is a dict
