"""From one command to all ranks and back: settle the run, start its ranks, watch them, say how it ended.

The process that was called is never a rank. A rank gets the settled configuration from the run directory, so none
composes its own. Started by torchrun or srun, which watch over ranks themselves, a process is a rank at once.
"""

import json
import os
import re
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

from syncbn.training.checkpoint import continue_run, inherit_config
from syncbn.training.config.machine import this_machine
from syncbn.training.config.plan import Plan
from syncbn.training.config.settle import settle
from syncbn.training.console import print_line, printable
from syncbn.training.distributed import (
    environment,
    loopback,
    rank_error,
    signals,
    slurm,
    store,
    unresponsive_ranks,
)
from syncbn.training.distributed.rank_processes import Ranks, Requests, StartError
from syncbn.training.distributed.signals import Interrupted, Stopped
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.launch import outcome, summary
from syncbn.training.os_errors import explain
from syncbn.training.run_directory import lock, paths, record, symlinks

CLOSING = 10.0  # seconds to mark the W&B run of a dead rank 0 as failed; its server does that too, in minutes

NAMES = ("run.id=", "ckpt_path=", "ckpt_restore=", "hydra.run.dir=")  # what says which run this is


class RunError(RuntimeError):
    """The ranks came to a bad end; what there was to say has been said.

    Attributes:
        code: of the program, by convention: 128 + the signal that stopped it, 1 for anything else.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def run(cfg: DictConfig) -> float | None:
    """Runs one job, as :func:`syncbn.training.launch.main.main` says; the best value of the monitored metric."""
    hydra = HydraConfig.get()
    in_sweep = hydra.mode == RunMode.MULTIRUN
    run_dir = Path(hydra.runtime.output_dir)
    try:
        try:
            return _run(cfg, run_dir, in_sweep)
        except OSError as error:  # of a file or process of the launcher's: what a rank raises is a RunError by now
            raise SettingError("run.id", printable(run_dir.name), explain(error, run_dir)) from error
    except (SettingError, RunError) as error:
        if isinstance(error, SettingError) and environment.rank() == 0:
            _say(f"error: {error}")
        code = getattr(error, "code", 1)
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or (in_sweep and code == 1):
            raise  # the sweep goes on
        sys.exit(code)


def _run(cfg: DictConfig, run_dir: Path, in_sweep: bool) -> float | None:
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    cfg = inherit_config.inherited(cfg, overrides, _tell if environment.rank() == 0 else lambda line: None)
    if in_sweep and cfg.logger.get("group", "") is None:
        cfg.logger.group = run_dir.parent.name
    named = in_sweep or cfg.run.id is not None
    named = named or any(each.startswith("hydra.run.dir=") for each in hydra.overrides.hydra)
    name = f"{run_dir.parent.name}-{run_dir.name}" if in_sweep else run_dir.name
    launch(settle(cfg, this_machine(), run_dir), Command(name, overrides, named))
    return record.monitored(run_dir) if environment.rank() == 0 else None


class Command(NamedTuple):
    """What the user typed.

    Attributes:
        name: of the run.
        overrides: settings as on the command line.
        named: whether the run was named, by ``run.id``, its directory, or as a job of a sweep.
    """

    name: str
    overrides: list[str]
    named: bool


def launch(plan: Plan, command: Command) -> None:
    """Does a run: starts its ranks, or is one of them where torchrun or srun started this process.

    Raises:
        SettingError: the run cannot begin.
        RunError: it ended badly, which is reported by then.
    """
    if environment.launcher():
        _be_a_rank(plan, command)
    else:
        _start_ranks(plan, command)


def _start_ranks(plan: Plan, command: Command) -> None:
    run_dir, nodes = plan.run_dir, plan.num_nodes
    if nodes > 1:
        raise SettingError(
            "trainer.num_nodes",
            nodes,
            f"python train.py starts the ranks of one machine; on each node call torchrun --nnodes={nodes} "
            f"--nproc-per-node={plan.devices} --rdzv-backend=c10d --rdzv-endpoint=HOST train.py",
        )
    with Requests(_say_that_it_stops) as requests:
        try:
            with requests.raising():
                begun = _begin(plan, command)
                if begun is None:
                    return
            _watch(begun, requests)
        except Interrupted as stop:
            raise _ended(f"{stop}; {_how_to_go_on(run_dir)}", 128 + stop.signum) from None
        except StartError as error:
            raise _ended(f"{error}; {_how_to_go_on(run_dir)}") from error
    _print_summary(run_dir)


def _watch(plan: Plan, requests: Requests) -> None:
    """Starts the ranks of a run that has begun, waits for them, and records how it ended."""
    run_dir = plan.run_dir
    status, refused, more = "failed", False, dict[str, Any]()
    try:
        ranks = Ranks(plan.devices, rank, (run_dir,), run_dir / "ranks", signals=requests)
        ends = ranks.watch(requests, plan.cfg.timeouts.stop)
        end = outcome.of(ends, requests.seen, run_dir, _how_to_go_on(run_dir))
        status, refused = end.status, end.refused
        if status == "interrupted" and _is_requeued():
            more["requeued"] = slurm.job()
            _say(_goes_back(end.message.partition(";")[0]))
            raise RunError(end.message, end.code)
        if end.code:
            raise _ended(end.message, end.code)
    except Interrupted:
        status = "interrupted"
        raise
    finally:
        with suppress(OSError):  # the disk may be full, which has been said
            record.end(run_dir, status, **more)
        if status != "finished":
            close_wandb(run_dir, requests)
            with suppress(OSError):
                record.take_back(run_dir, refused=refused)
        lock.release(run_dir)


def _begin(asked: Plan, command: Command) -> Plan | None:
    """Takes the run directory and writes the beginning of its record.

    Returns:
        The plan with the checkpoint that the run starts from; None where the run has finished before.
    """
    run_dir, began = asked.run_dir, False
    lock.hold(run_dir)
    try:
        plan = continue_run.continued(asked, _tell, command.overrides, named=command.named)
        if plan is None:
            record.mend(asked, command.name, command.overrides)
            _tell(f"run {command.name} has finished before; this is what came out")
            _print_summary(run_dir)
            lock.release(run_dir)
            return None
        for link in symlinks.detach(run_dir):
            _tell(f"{link} was a symbolic link: this run writes into its own directory, and nothing where that led")
        began = True
        record.begin(plan, command.name, command.overrides, continue_run.begun_from(asked))
        _tell(summary.headline(plan))
    except BaseException as error:
        with suppress(Exception):
            if began and record.read(run_dir, "run").get("status") == "running":
                record.end(run_dir, "interrupted" if isinstance(error, Interrupted) else "failed")
        lock.release(run_dir)
        raise
    return plan


def rank(run_dir: Path) -> None:
    """The entry point of a rank that this module started."""
    run = import_run()
    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    run(Plan.of(cfg, run_dir))


def _agreed(plan: Plan, command: Command) -> Plan | None:
    """Begins the run on rank 0; every rank gets the checkpoint that rank 0 found, or None where there is nothing to do.

    Only rank 0 reads earlier attempts: a file system may be late to show the same to all.
    """

    def begin() -> str:
        begun = _begin(plan, command)
        return json.dumps(None if begun is None else [begun.checkpoint, begun.restore])

    start = json.loads(store.shared("start", begin))
    return None if start is None else Plan.of(plan.starting_from(*start).settings(), plan.run_dir)


def _be_a_rank(asked: Plan, command: Command) -> None:
    first, run_dir = environment.rank() == 0, asked.run_dir
    plan = _agreed(asked, command)
    if plan is None:
        return
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
            _come_back(stop, run_dir)
        elif first:
            _say(f"error: {stop}; {_how_to_go_on(run_dir)}")
        sys.exit(128 + stop.signum)
    except SettingError as error:
        refused = True
        if not first and not isinstance(error, AgreedError):
            _say(f"error: rank {environment.rank()}: {error}")
        raise
    except Exception as error:
        raise _failed(error, run_dir, plan.cfg.timeouts.collective) from error
    finally:
        if first:
            with suppress(OSError):
                record.end(run_dir, status)
                if status != "finished":
                    record.take_back(run_dir, refused=refused)
    if first:
        _print_summary(run_dir)


def _failed(error: Exception, run_dir: Path, timeout: float) -> RunError:
    """What a rank says of its own end, where nobody watches it who could, and of those that it has waited for."""
    rank, about = environment.rank(), rank_error.about(error)
    trace = run_dir / "ranks" / f"{rank}-error.txt"
    with suppress(OSError):
        trace.parent.mkdir(exist_ok=True)
        trace.write_text(about["trace"], encoding="utf-8", errors="backslashreplace")
    where = f"rank {rank} of {os.environ['WORLD_SIZE']} on {environment.host()}"
    what = outcome.what(about, trace, unresponsive_ranks.to_blame(error, timeout))
    return _ended(f"{where} failed: {what}; {_how_to_go_on(run_dir)}")


def _come_back(stop: Stopped, run_dir: Path) -> None:
    """Puts the job back into Slurm's queue, where this is in order; what became of that is said."""

    def requeue() -> str:
        record.end(run_dir, "interrupted")  # here, for Slurm ends this process
        try:
            asks = slurm.comes_back(stop.signum)
            if asks or slurm.goes_back():
                record.end(run_dir, "interrupted", requeued=slurm.job())
                _say(_goes_back(stop))
                if asks:
                    slurm.requeue()
                return "yes"
        except SettingError as error:
            record.end(run_dir, "interrupted", requeued=None)
            _say(f"error: {error}")
        _say(f"error: {stop}; {_how_to_go_on(run_dir)}")
        return "no"

    store.shared("requeue", requeue)  # all wait for it: a task that ends may end the job


def _goes_back(stop: object) -> str:
    return f"{stop}: job {slurm.job()} goes back into the queue, and will go on from its last checkpoint"


def _is_requeued() -> bool:
    """Whether this process is the batch script of a job that Slurm starts again."""
    if slurm.job() is None or slurm.is_interactive():
        return False
    try:
        return slurm.goes_back()
    except SettingError:  # no scontrol here
        return False


def import_run() -> Callable[[Plan], None]:
    """A rank's job. Importing Lightning imports torchvision, where it is installed."""
    try:
        from syncbn.training.launch import rank as run
    except (ImportError, OSError, RuntimeError) as error:
        if "torchvision" not in str(error):
            raise
        raise SettingError(
            f"torchvision {version('torchvision')} does not go with torch {torch.__version__}, and Lightning cannot be "
            f"imported beside it ({' '.join(str(error).split())})",
            hint="install the build that belongs to this torch, or remove it (pip uninstall torchvision)",
        ) from error
    return run.run


def close_wandb(run_dir: Path, requests: Requests) -> None:
    """Marks the W&B run as failed, where rank 0 did not live to do it, and nobody wants an end at once.

    In a process that is forked for it: imports that take seconds are done there, and it can be killed.
    """
    if record.read(run_dir, "wandb").get("finished") is not False or requests.enough:
        return
    with suppress(OSError, RuntimeError, Interrupted):
        closing = Ranks(1, _mark_failed, (run_dir,), run_dir / "ranks", silent=True)
        closing.watch(requests, CLOSING, limit=CLOSING)


def _mark_failed(run_dir: Path) -> None:
    from syncbn.training.loggers import wandb_logger

    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    with suppress(SettingError):  # that a server is gone is no news by now
        wandb_logger.mark_failed(cfg, run_dir)


def _how_to_go_on(run_dir: Path) -> str:
    """The command that goes on with this run."""
    if record.read(run_dir, "run").get("tests"):
        return "the same command tests it again"
    if not (run_dir / "checkpoints" / "last.ckpt").exists():
        return "there was no checkpoint yet"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"the same sweep with hydra.sweep.dir={paths.short(run_dir.parent)} goes on with it"
    program, *settings = (each for each in sys.argv if not each.startswith(NAMES))
    settings.append(_name(run_dir))
    if environment.launcher() == "srun":
        return f"go on with: sbatch slurm/train.sbatch {shlex.join(settings)}"
    if environment.launcher() == "torchrun":
        return f"go on with: torchrun ... {shlex.join([program, *settings])}, as before"
    return f"go on with: {shlex.join(['python', program, *settings])}"


def _name(run_dir: Path) -> str:
    """The setting that finds this run again, in quotes where Hydra wants them."""
    key, value = "hydra.run.dir", paths.short(run_dir)
    if run_dir.resolve() == Path("outputs", run_dir.name).resolve():
        key, value = "run.id", run_dir.name
    return f"{key}={value}" if re.fullmatch(r"[A-Za-z0-9_./+@-]+", value) else f"{key}='{value}'"


def _ended(message: str, code: int = 1) -> RunError:
    _say(f"error: {message}")
    return RunError(message, code)


def _say_that_it_stops(signum: int) -> None:
    more = "; once more ends it at once" if signum == signal.SIGINT else ""
    _say(f"{signal.Signals(signum).name}: stopping after this step, with a checkpoint{more}")


def _print_summary(run_dir: Path) -> None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:  # its table has it all
        return
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:  # a table for a file or a pipe is as wide as it is
        console.width = 1000
    console.print(summary.summary(run_dir))


def _tell(line: str) -> None:
    print_line(line)


def _say(message: str) -> None:
    print_line(message, error=True)
