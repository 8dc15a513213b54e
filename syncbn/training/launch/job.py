"""Runs one job: settles its settings, starts its ranks, monitors them, and reports how the run ended.

With ``python train.py`` the called process is the launcher and never a rank. The ranks read the settled settings from
the run directory, so none of them composes its own. torchrun and srun start and monitor the ranks themselves, so a
process that they started is a rank.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from syncbn.training import import_paths, program
from syncbn.training.checkpoint import continue_run, inherit_config
from syncbn.training.config.machine import this_machine
from syncbn.training.config.plan import Plan
from syncbn.training.config.settle import settle
from syncbn.training.console import print_line, printable
from syncbn.training.distributed import environment, loopback, signals, slurm, store, unresponsive_ranks
from syncbn.training.distributed.signals import Interrupted, Stopped
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.launch import outcome, summary
from syncbn.training.launch.outcome import is_requeued, requeue_message, resume_hint
from syncbn.training.loggers import chosen as chosen_loggers
from syncbn.training.network import check as check_network
from syncbn.training.os_errors import explain
from syncbn.training.processes import rank_error
from syncbn.training.processes.quick_imports import no_garbage_collection
from syncbn.training.processes.rank_processes import Ranks, Requests, StartError
from syncbn.training.run_directory import lock, record, symlinks
from syncbn.training.search import objective
from syncbn.training.terminal import train_log
from syncbn.training.terminal.train_log import TrainLog
from syncbn.training.vision_packages import install_command

FIRST = 10.0  # seconds in which rank 0 prints an error that another rank has found too
CLOSING = 10.0  # seconds to record the end of a dead rank 0 in its loggers; W&B's server does that too, in minutes
LOGGERS = ("wandb", "tensorboard", "mlflow")  # whose records in the run directory have "finished"


class RunError(RuntimeError):
    """A run failed or was stopped. Its error line has been printed already.

    Attributes:
        code: exit code of the program: 128 + the signal that stopped it, 1 for any other failure.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def run(cfg: DictConfig) -> float | None:
    """Runs one job under Hydra; see :func:`syncbn.training.launch.main.main`.

    Returns:
        The value that a sweeper optimizes.
    """
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    with train_log.copying(errors_only=environment.rank() > 0) as log:
        try:
            try:
                return _run(cfg, run_dir, log)
            except OSError as error:  # of a file or process of the launcher; an exception of a rank is a RunError here
                raise SettingError("run.id", printable(run_dir.name), explain(error, run_dir)) from error
        except (SettingError, RunError) as error:
            if isinstance(error, SettingError):
                _print_once(error)
            code = getattr(error, "code", 1)
            if os.environ.get("HYDRA_FULL_ERROR") == "1" or (_in_sweep() and code == 1):
                raise  # the sweep catches it and runs the next job
            sys.exit(code)


def _print_once(error: SettingError) -> None:
    """Prints an error that all ranks may have found, each for itself: on rank 0, if it lives long enough.

    srun with ``--kill-on-bad-exit`` and torchrun stop all ranks when the first fails. Another rank may be faster than
    rank 0, which may still import torch. So it waits to be stopped, and prints the error itself if nobody stops it.
    """
    rank = environment.rank()
    if rank == 0:
        _print_error(f"error: {error}")
    elif not (isinstance(error, AgreedError) or signals.wait(FIRST)):
        _print_error(f"error: rank {rank}: {error}")


def _run(cfg: DictConfig, run_dir: Path, log: TrainLog) -> float | None:
    given, in_sweep = HydraConfig.get().overrides, _in_sweep()
    overrides = list(given.task)
    cfg = inherit_config.inherited(cfg, overrides, print_line if environment.rank() == 0 else lambda line: None)
    for group in (cfg.logger, cfg.logger.get("mlflow") or {}) if in_sweep else ():
        if group.get("group", "") is None:
            group["group"] = run_dir.parent.name
    named = in_sweep or cfg.run.id is not None or any(each.startswith("hydra.run.dir=") for each in given.hydra)
    name = f"{run_dir.parent.name}-{run_dir.name}" if in_sweep else run_dir.name
    perform = _run_as_rank if environment.launcher() else _start_ranks
    plan = settle(check_network.located(cfg, run_dir), this_machine(), run_dir)
    check_network.check(plan)
    chosen_loggers.check(plan.cfg.logger)
    perform(plan, Command(name, overrides, named), log)
    return objective.value(run_dir, cfg.objective if in_sweep else None) if environment.rank() == 0 else None


class Command(NamedTuple):
    """The command line of a run."""

    name: str  # of the run
    overrides: list[str]
    named: bool  # the run was named, by run.id, its directory, or as a job of a sweep


def _start_ranks(plan: Plan, command: Command, log: TrainLog) -> None:
    run_dir, nodes = plan.run_dir, plan.num_nodes
    if nodes > 1:
        hint = f"{program.name()} starts the ranks of one machine; on each node call torchrun --nnodes={nodes} "
        hint += f"--nproc-per-node={plan.devices} --rdzv-backend=c10d --rdzv-endpoint=HOST "
        hint += shlex.join(program.for_torchrun())
        raise SettingError("trainer.num_nodes", nodes, hint)
    with Requests(_announce_stop) as requests:
        try:
            with requests.raising():
                begun = _begin(plan, command, log)
                if begun is None:
                    return
            _watch(begun, requests)
        except Interrupted as stop:
            raise _printed(f"{stop}; {resume_hint(run_dir)}", 128 + stop.signum) from None
        except StartError as error:
            raise _printed(f"{error}; {resume_hint(run_dir)}") from error
    _print_summary(run_dir)


def _watch(plan: Plan, requests: Requests) -> None:
    """Starts the ranks of a run that has begun, waits for them, and records how it ended."""
    run_dir = plan.run_dir
    status, refused, more = "failed", False, dict[str, Any]()
    try:
        ranks = Ranks(plan.devices, rank, (run_dir,), run_dir / "ranks", signals=requests)
        ends = ranks.watch(requests, plan.cfg.timeouts.stop)
        end = outcome.of(ends, requests.seen, run_dir, resume_hint(run_dir))
        status, refused = end.status, end.refused
        if status == "interrupted" and is_requeued():
            more["requeued"] = slurm.job()
            _print_error(requeue_message(end.message.partition(";")[0]))
            raise RunError(end.message, end.code)
        if end.code:
            raise _printed(end.message, end.code)
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        record_end(run_dir, status, refused, requests, **more)


def record_end(run_dir: Path, status: str, refused: bool, requests: Requests, **more: Any) -> None:
    """Records how a run ended whose ranks this process has started, and unlocks its directory."""
    with suppress(OSError):  # the disk may be full, which has been reported
        record.end(run_dir, status, **more)
    if status != "finished":
        _draw_curves(run_dir, requests)
        _close_loggers(run_dir, requests)
        with suppress(OSError):
            record.undo_begin(run_dir, refused=refused)
    lock.release(run_dir)


def _begin(asked: Plan, command: Command, log: TrainLog) -> Plan | None:
    """Locks the run directory and writes ``run.json`` and ``config.yaml`` of this attempt; begins its log.

    Returns:
        The plan with the checkpoint that the run starts from; None if the run has finished before.
    """
    run_dir, began = asked.run_dir, False
    lock.hold(run_dir)
    try:
        plan = continue_run.continued(asked, print_line, command.overrides, named=command.named)
        if plan is None:
            record.repair(asked, command.name, command.overrides)
            print_line(f"run {command.name} has finished before{'' if _in_sweep() else '; its results:'}")
            _print_summary(run_dir)
            lock.release(run_dir)
            return None
        for link in symlinks.detach(run_dir):
            print_line(f"{link} was a symbolic link and was replaced: a run writes into its own directory only")
        began = True
        record.begin(plan, command.name, command.overrides, continue_run.begun_from(asked))
        log.begin(run_dir, _heading(run_dir, command))
        print_line(summary.headline(plan))
    except BaseException as error:
        with suppress(Exception):
            if began and record.read(run_dir, "run").get("status") == "running":
                record.end(run_dir, "interrupted" if isinstance(error, Interrupted) else "failed")
                log.begin(run_dir, _heading(run_dir, command))  # a signal may have come before
        lock.release(run_dir)
        raise
    return plan


def _heading(run_dir: Path, command: Command) -> str:
    """The first line of this attempt in ``train.log``: its number, and the command without Hydra's own settings."""
    words = [*program.words(), *command.overrides]
    return train_log.heading(record.read(run_dir, "run").get("attempt", 1), shlex.join(words))


def rank(run_dir: Path) -> None:
    """Entry point of a rank process that this module started: reads the settled settings and runs the rank."""
    run, cfg = import_run(), _settled(run_dir)
    import_paths.allow(OmegaConf.to_container(cfg))  # the job has checked them
    if environment.rank() > 0:  # its output goes to a file already
        run(Plan.of(cfg, run_dir))
        return
    with train_log.copying() as log:
        log.begin(run_dir)
        run(Plan.of(cfg, run_dir))


def _settled(run_dir: Path) -> DictConfig:
    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


def _run_as_rank(asked: Plan, command: Command, log: TrainLog) -> None:
    """Runs as one rank of a run whose ranks torchrun or srun has started."""
    first, run_dir = environment.rank() == 0, asked.run_dir

    def begin() -> str:
        begun = _begin(asked, command, log)
        return json.dumps(None if begun is None else [begun.checkpoint, begun.restore])

    # Only rank 0 reads the earlier attempts: a network file system may show an old state to other ranks.
    start = json.loads(store.shared("start", begin))
    if start is None:  # the run has finished before
        return
    plan = Plan.of(asked.starting_from(*start).settings(), run_dir)
    if not first:
        log.begin(run_dir)
    if os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"]:
        os.environ.update(loopback.within_machine())
    status, refused = "failed", False
    try:
        import_run()(plan)
        status = "finished"
        signals.done()
    except Stopped as stop:
        status = "interrupted"
        if environment.launcher() == "srun" and plan.cfg.cluster.requeue:
            _requeue(stop, run_dir)
        elif first:
            _print_error(f"error: {stop}; {resume_hint(run_dir)}")
        sys.exit(128 + stop.signum)
    except SettingError as error:
        refused = True
        if not first and not isinstance(error, AgreedError):
            raise _printed(f"rank {environment.rank()}: {error}") from error
        raise
    except Exception as error:
        raise _rank_failure(error, run_dir, plan.cfg.timeouts.collective) from error
    finally:
        if first:
            with suppress(OSError):
                record.end(run_dir, status)
                if status != "finished":
                    record.undo_begin(run_dir, refused=refused)
    if first:
        _print_summary(run_dir)


def _rank_failure(error: Exception, run_dir: Path, timeout: float) -> RunError:
    """Prints the error of this rank under torchrun and srun, and names the ranks that it waited for in vain."""
    rank, about = environment.rank(), rank_error.describe(error)
    trace = run_dir / "ranks" / f"{rank}-error.txt"
    with suppress(OSError):
        trace.parent.mkdir(exist_ok=True)
        trace.write_text(about["trace"], encoding="utf-8", errors="backslashreplace")
    where = f"rank {rank} of {os.environ['WORLD_SIZE']} on {environment.host()}"
    failure = outcome.failure(about, trace, unresponsive_ranks.find_unresponsive(error, timeout))
    return _printed(f"{where} failed: {failure}; {resume_hint(run_dir)}")


def _requeue(stop: Stopped, run_dir: Path) -> None:
    """Requeues the Slurm job on rank 0 if its time is up or it was preempted, and prints whether it was requeued."""

    def requeue() -> str:
        record.end(run_dir, "interrupted")  # before the requeue, which ends this process
        try:
            needed = slurm.should_requeue(stop.signum)
            if needed or slurm.was_requeued():
                record.end(run_dir, "interrupted", requeued=slurm.job())
                _print_error(requeue_message(stop))
                if needed:
                    slurm.requeue()
                return "yes"
        except SettingError as error:
            record.end(run_dir, "interrupted", requeued=None)
            _print_error(f"error: {error}")
        _print_error(f"error: {stop}; {resume_hint(run_dir)}")
        return "no"

    # All ranks wait here for rank 0: if one task ended now, Slurm could end the whole job before it is requeued.
    store.shared("requeue", requeue)


def import_run() -> Callable[[Plan], None]:
    """Imports :func:`syncbn.training.launch.rank.run`.

    Lightning imports torchvision if it is installed, and a torchvision for another torch raises an error at import.

    Raises:
        SettingError: the installed torchvision does not match torch.
    """
    try:
        with no_garbage_collection():
            from syncbn.training.launch import rank as run
    except (ImportError, OSError, RuntimeError) as error:
        if "torchvision" not in str(error):
            raise
        wrong = f"torchvision {version('torchvision')} does not go with torch {torch.__version__}, "
        wrong += f"and Lightning cannot be imported beside it ({' '.join(str(error).split())})"
        hint = f"{install_command()} installs one that does; or remove it (pip uninstall torchvision)"
        raise SettingError(wrong, hint=hint) from error
    return run.run


def _close_loggers(run_dir: Path, requests: Requests) -> None:
    """Records the end in the loggers if rank 0 was killed before it could, unless a second signal asked to end at once.

    A forked process does it: the fork server has imported W&B already, and the process can be killed after a time-out.
    """
    if not any(record.read(run_dir, name).get("finished") is False for name in LOGGERS) or requests.kill_requested:
        return
    limit = CLOSING * (3 if record.read(run_dir, "mlflow").get("finished") is False else 1)  # a database may be slow
    with suppress(OSError, RuntimeError, Interrupted):
        closing = Ranks(1, _mark_failed, (run_dir,), run_dir / "ranks", silent=True)
        closing.watch(requests, limit, limit=limit)


def _draw_curves(run_dir: Path, requests: Requests) -> None:
    """Draws the curves of a run whose rank 0 was killed before it could; a forked process does it, as above."""
    table, picture = run_dir / "metrics.csv", run_dir / "curves.png"
    with suppress(Exception):  # the settings may be damaged, the disk full, the fork server gone
        current = picture.exists() and picture.stat().st_mtime >= table.stat().st_mtime
        trained = record.read(run_dir, "run").get("trained") and table.exists()
        if trained and not current and _settled(run_dir).get("plots") and not requests.kill_requested:
            drawing = Ranks(1, _curves, (run_dir,), run_dir / "ranks", silent=True)
            drawing.watch(requests, CLOSING, limit=CLOSING)


def _curves(run_dir: Path) -> None:
    from syncbn.training.plots.curves import write_curves

    write_curves(run_dir)


def _mark_failed(run_dir: Path) -> None:
    from syncbn.training.loggers import run_loggers

    with suppress(SettingError):  # an unreachable server has been reported before
        run_loggers.mark_failed(_settled(run_dir), run_dir, str(record.read(run_dir, "run").get("status")))


def _printed(message: str, code: int = 1) -> RunError:
    """Prints the error and returns it as an exception."""
    _print_error(f"error: {message}")
    return RunError(message, code)


def _announce_stop(signum: int) -> None:
    more = "; a second SIGINT ends it at once" if signum == signal.SIGINT else ""
    _print_error(f"{signal.Signals(signum).name}: the run stops after this step and saves a checkpoint{more}")


def _in_sweep() -> bool:
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _print_summary(run_dir: Path) -> None:
    if _in_sweep():  # the sweep prints one table of all jobs
        return
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:  # in a file or a pipe the table keeps its full width
        console.width = 1000
    console.print(summary.summary(run_dir))


def _print_error(message: str) -> None:
    print_line(message, error=True)
