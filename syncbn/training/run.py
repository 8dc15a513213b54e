"""The job of one rank: build everything from the settings, fit, test, and (rank 0) write down what came out."""

import logging
import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torchmetrics.utilities import prints

from syncbn.training import config, fit, loggers, norms, precise, preflight, record, silent, simulated
from syncbn.training.finite import stopper
from syncbn.training.gradients import GradientMonitor
from syncbn.training.monitor import StatisticsMonitor
from syncbn.training.preflight import CompareRanks
from syncbn.training.progress import Bar, LogLines, MergeMetrics, Throughput, shows_bar
from syncbn.training.resume import ResumePoints
from syncbn.training.saving import AtomicCheckpointIO
from syncbn.training.schema import SettingError
from syncbn.training.stopping import Stopped
from syncbn.training.target import TimeToTarget


def run(cfg: DictConfig, run_dir: Path) -> None:
    """Trains and tests as this rank, whose number the launcher's environment gives (``RANK``, ``WORLD_SIZE``, ...).

    Args:
        cfg: settled settings.
        run_dir: the run directory, begun by :func:`syncbn.training.record.begin`; the same on all ranks.
    """
    _quieten()
    if cfg.trainer.accelerator == "cpu":
        asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        share = (os.cpu_count() or 1) // cfg.trainer.devices
        torch.set_num_threads(int(asked) if asked.isdigit() else max(1, share))
    preflight.look(cfg, run_dir)
    rank = int(os.environ["RANK"])
    for of_rank_0 in (rank_zero_only, prints.rank_zero_only):
        of_rank_0.rank = rank  # type: ignore[union-attr]  # they looked for it when the server imported them, which is none
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    try:
        result = _fit_and_test(cfg, run_dir, rank)
    except BaseException as error:
        silent.leave_word(error)  # before the loggers, which may take a minute
        stop = isinstance(error, Stopped)
        loggers.finish(run_dir, failed=not stop, preempted=stop)
        if stop and dist.is_initialized():
            dist.destroy_process_group()
        raise
    if rank == 0:
        record.write(run_dir, "result", result)
        loggers.finish(run_dir, failed=False, summary=result)
    if dist.is_initialized():  # gloo's thread may abort a process that ends with it; Lightning ends NCCL's group alone
        dist.destroy_process_group()


def _fit_and_test(cfg: DictConfig, run_dir: Path, rank: int) -> dict[str, Any]:
    data = OmegaConf.masked_copy(cfg.data, [k for k in cfg.data if k != "global_batch_size"])
    if cfg.simulate:
        data.batch_size = config.loader_batch(cfg)
    datamodule = build(data)
    module = build(cfg.module)
    norm = _plain(cfg.norm)
    norms.prepare_model(module, norm)
    if cfg.simulate:
        simulated.refuse(module)
    exchange = simulated.parts(cfg) if cfg.simulate else norms.parts(norm)
    throughput, settings = Throughput(), dict(build(cfg.trainer))
    settings["enable_progress_bar"] = shows_bar(settings)
    if cfg.simulate:
        settings["accumulate_grad_batches"] = 1  # they are in one
    callbacks: list[pl.Callback] = [MergeMetrics(), CompareRanks(cfg, run_dir)]
    callbacks += [_resume_points(cfg, run_dir), *exchange.callbacks, throughput]
    if cfg.fit:
        callbacks.append(fit.RefuseUnfit())
    if cfg.target is not None:
        callbacks.append(TimeToTarget(config.target_monitor(cfg), cfg.target))
    callbacks += [Bar() if settings["enable_progress_bar"] else LogLines(), *map(build, (cfg.callbacks or {}).values())]
    suite = build(cfg.corruptions) if cfg.corruptions else None
    callbacks += [suite] if suite else []
    trainer = pl.Trainer(
        strategy=DDPStrategy(timeout=timedelta(seconds=cfg.timeouts.collective), **exchange.ddp_arguments),
        plugins=[TorchElasticEnvironment(), AtomicCheckpointIO(), *exchange.plugins],
        logger=loggers.build(cfg, run_dir, rank),
        callbacks=callbacks,
        default_root_dir=run_dir,
        **settings,
    )
    _leave_signals_alone(trainer)
    # Lightning does this too, but after it has loaded a checkpoint: numbers in float64 would go through float32.
    trainer.precision_plugin.convert_module(module)
    start = time.monotonic()
    trainer.fit(module, datamodule=datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
    seconds = time.monotonic() - start
    stops = stopper(trainer)
    if trainer.global_step == 0 and not (stops and stops.diverged):
        raise SettingError(
            f"data.batch_size={cfg.data.batch_size}: no batch was trained on; either the data gives none of that size, "
            "or a limit under trainer allows none"
        )
    best = getattr(trainer.checkpoint_callback, "best_model_path", None) or None
    result: dict[str, Any] = {
        "seconds": seconds,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "epochs_before": throughput.epochs_before,
        "images_per_second": throughput.images_per_second,
        "checkpoint": best,
    }
    if stops is not None:
        result["diverged"] = int(stops.diverged)
    if collectives := next((each.collectives for each in callbacks if isinstance(each, StatisticsMonitor)), None):
        result["collectives"] = collectives
    if gradients := next((each.gradients for each in callbacks if isinstance(each, GradientMonitor)), None):
        result["gradients"] = gradients
    if target := next((each for each in callbacks if isinstance(each, TimeToTarget)), None):
        result["target"] = target.result
    if cfg.test:
        metrics = trainer.test(module, datamodule=datamodule, ckpt_path=best, verbose=False, weights_only=True)
        result["test"] = {name: value for each in metrics for name, value in each.items()}
    if suite:
        result |= suite.result
        trainer.callbacks.remove(suite)  # type: ignore[attr-defined]  # what tests again is another test
    again: dict[str, Any] = {"datamodule": datamodule, "ckpt_path": best, "weights_only": True}
    if cfg.fit:
        result["fit"] = fit.test_fit(trainer, module, result["test"], **again)
    if cfg.precise_batches:  # the last, for where no checkpoint is loaded it changes the running statistics
        batches = cfg.precise_batches // config.in_one(cfg)
        result["precise"] = precise.test_precisely(trainer, module, batches, **again)
    return result


def _resume_points(cfg: DictConfig, run_dir: Path) -> ResumePoints:
    return ResumePoints(
        run_dir / "checkpoints",
        global_batch_size=cfg.data.global_batch_size,
        counted_in=config.counted_in(cfg),
        own_buffers=cfg.norm.name == "local_mean",
        timeout=timedelta(seconds=cfg.timeouts.collective),
        on_missing=lambda line: print(line, flush=True),
        **_plain(cfg.resume),
    )


def _leave_signals_alone(trainer: pl.Trainer) -> None:
    """Keeps Lightning's handler of SIGTERM out, which sends a message from within, and its message before every step.

    :class:`ResumePoints` does what they are for.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def build(cfg: Any) -> Any:
    """The object that ``cfg._target_`` names; its arguments are plain lists and dicts, as config objects do not belong
    into checkpoints.
    """
    try:
        return instantiate(cfg, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, SettingError):
            raise cause from None
        missing = None if cause is None else cause.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and "." not in missing.name:
            target = str(cause).split("'")[1]
            raise SettingError(
                f"_target_={target}: there is no package {missing.name} here; install it (torchvision and timm: pip "
                "install '.[vision]')"
            ) from error
        raise


def _quieten() -> None:
    """Leaves out what Lightning and torch say about every run; warnings that ask for something stay."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for about in (
        "does not have many workers",  # digits are in memory
        "is smaller than the logging interval",
        "Checkpoint directory .* exists and is not empty",  # a run that goes on in its directory
        "LeafSpec.* is deprecated",  # Lightning 2.6 on torch 2.13
        "You're resuming from a checkpoint that ended before the epoch ended",  # resume.py says what it does about it
        "The `srun` command is available on your system but is not used",  # a machine may have it and not be asked for
    ):
        warnings.filterwarnings("ignore", f".*{about}")


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return dict(OmegaConf.to_container(cfg))  # type: ignore[arg-type]  # a DictConfig's container is a dict
