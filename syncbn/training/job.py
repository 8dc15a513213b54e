"""From one command to all ranks and back: settle the run, start its ranks, watch them, say how it ended.

The process that was called is never a rank. A rank gets the settled configuration from the run directory, so none
composes its own. Started by torchrun or srun, which watch over ranks themselves, a process is a rank at once.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from syncbn.training import attempts, config, identity, outcome, ranks, record, silent, slurm, stopping, tested
from syncbn.training.ranks import Ranks, Requests
from syncbn.training.schema import AgreedError, SettingError
from syncbn.training.stopping import Stopped


class RunError(RuntimeError):
    """The ranks came to a bad end; what there was to say has been said.

    Attributes:
        code: of the program, by convention: 128 + the signal that stopped it, 1 for anything else.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def run(cfg: DictConfig) -> float | None:
    """Runs one job, as :func:`syncbn.training.launch.main` says; the best value of the monitored metric."""
    hydra = HydraConfig.get()
    in_sweep = hydra.mode == RunMode.MULTIRUN
    try:
        if in_sweep and identity.launcher() == "torchrun":
            raise SettingError("-m: torchrun starts the ranks of one run, not of a sweep; call python train.py -m")
        overrides = list(hydra.overrides.task)
        tested.take(cfg, overrides, _tell if identity.rank() == 0 else lambda line: None)
        config.settle(cfg)
        run_dir = Path(hydra.runtime.output_dir)
        name = f"{run_dir.parent.name}-{run_dir.name}" if in_sweep else run_dir.name
        if in_sweep and cfg.logger.get("group", "") is None:
            cfg.logger.group = run_dir.parent.name
        if identity.launcher():
            _be_a_rank(cfg, run_dir, name, overrides)
        else:
            _start_ranks(cfg, run_dir, name, overrides)
        return record.monitored(run_dir) if identity.rank() == 0 else None
    except (SettingError, RunError) as error:
        if isinstance(error, SettingError) and identity.rank() == 0:
            _say(f"error: {error}")
        code = getattr(error, "code", 1)
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or (in_sweep and code == 1):
            raise  # the sweep goes on
        sys.exit(code)


def _start_ranks(cfg: DictConfig, run_dir: Path, name: str, overrides: list[str]) -> None:
    nodes, devices = cfg.trainer.num_nodes, cfg.trainer.devices
    if nodes > 1:
        raise SettingError(
            f"trainer.num_nodes={nodes}: python train.py starts the ranks of one machine; on each node call "
            f"torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d --rdzv-endpoint=HOST train.py"
        )
    if not _begin(cfg, run_dir, name, overrides):
        return
    status = "failed"
    try:
        with Requests(_say_that_it_stops) as requests:
            ends = Ranks(devices, rank, (run_dir,), run_dir / "ranks").watch(requests, cfg.timeouts.stop)
        end = outcome.of(ends, requests.seen, run_dir, _how_to_go_on(run_dir))
        status = end.status
        if end.code:
            raise _ended(end.message, end.code)
    finally:
        with suppress(OSError):  # the disk may be full, which has been said
            record.end(run_dir, status)
        if status != "finished":
            close_wandb(cfg, run_dir)
        identity.release(run_dir)
    _print_summary(run_dir)


def _begin(cfg: DictConfig, run_dir: Path, name: str, overrides: list[str]) -> bool:
    """Takes the run directory and writes the beginning of its record; False where the run has finished before."""
    identity.hold(run_dir)
    named = attempts.begun_from(cfg)
    try:
        if not attempts.go_on(cfg, run_dir, _tell):
            _tell(f"run {name} has finished before; this is what came out")
            _print_summary(run_dir)
            identity.release(run_dir)
            return False
        named = named or record.read(run_dir, "run").get("begun_from")
        record.begin(cfg, run_dir, name, overrides)
        record.write(run_dir, "run", record.read(run_dir, "run") | {"begun_from": named})
    except BaseException:
        identity.release(run_dir)
        raise
    _tell(record.headline(cfg))
    return True


def rank(run_dir: Path) -> None:
    """The entry point of a rank that this module started."""
    run = import_run()
    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    run(cfg, run_dir)


def _be_a_rank(cfg: DictConfig, run_dir: Path, name: str, overrides: list[str]) -> None:
    first = identity.rank() == 0
    go = identity.shared("go", lambda: "yes" if _begin(cfg, run_dir, name, overrides) else "no") == "yes"
    if not go:
        return
    cfg.ckpt_path = identity.shared("ckpt_path", lambda: cfg.ckpt_path or "") or None
    status = "failed"
    try:
        import_run()(cfg, run_dir)
        status = "finished"
        stopping.done()
    except Stopped as stop:
        status = "interrupted"
        if identity.launcher() == "srun" and cfg.cluster.requeue:
            _come_back(stop, run_dir)
        elif first:
            _say(f"error: {stop}; {_how_to_go_on(run_dir)}")
        sys.exit(128 + stop.signum)
    except SettingError as error:
        if not first and not isinstance(error, AgreedError):
            _say(f"error: rank {identity.rank()}: {error}")
        raise
    except Exception as error:
        raise _failed(error, run_dir, cfg.timeouts.collective) from error
    finally:
        if first:
            with suppress(OSError):
                record.end(run_dir, status)
    if first:
        _print_summary(run_dir)


def _failed(error: Exception, run_dir: Path, timeout: float) -> RunError:
    """What a rank says of its own end, where nobody watches it who could, and of those that it has waited for."""
    rank, about = identity.rank(), ranks.about(error)
    trace = run_dir / "ranks" / f"{rank}-error.txt"
    with suppress(OSError):
        trace.parent.mkdir(exist_ok=True)
        trace.write_text(about["trace"], encoding="utf-8", errors="backslashreplace")
    where = f"rank {rank} of {os.environ['WORLD_SIZE']} on {identity.host()}"
    what = outcome.what(about, trace, silent.to_blame(error, timeout))
    return _ended(f"{where} failed: {what}; {_how_to_go_on(run_dir)}")


def _come_back(stop: Stopped, run_dir: Path) -> None:
    """Puts the job back into Slurm's queue, where this is in order; what became of that is said."""

    def requeue() -> str:
        record.end(run_dir, "interrupted")  # here, for Slurm ends this process
        try:
            if slurm.comes_back(stop.signum):
                _say(f"{stop}: job {slurm.job()} goes back into the queue, and will go on from its last checkpoint")
                slurm.requeue()
                return "yes"
        except SettingError as error:
            _say(f"error: {error}")
        _say(f"error: {stop}; {_how_to_go_on(run_dir)}")
        return "no"

    identity.shared("requeue", requeue)  # all wait for it: a task that ends may end the job


def import_run() -> Callable[[DictConfig, Path], None]:
    """A rank's job. Importing Lightning imports torchvision, where it is installed."""
    try:
        from syncbn.training import run
    except (ImportError, OSError, RuntimeError) as error:
        if "torchvision" not in str(error):
            raise
        raise SettingError(
            f"torchvision {version('torchvision')} does not go with torch {torch.__version__}, and Lightning cannot be "
            f"imported beside it ({' '.join(str(error).split())}): install the build that belongs to this torch, or "
            "remove it (pip uninstall torchvision)"
        ) from error
    return run.run


def close_wandb(cfg: DictConfig, run_dir: Path) -> None:
    """Marks the W&B run as failed, where rank 0 did not live to do it; that a server is gone is no news by now."""
    if record.read(run_dir, "wandb").get("finished") is False:
        from syncbn.training import loggers

        with suppress(SettingError):
            loggers.mark_failed(cfg, run_dir)


def _how_to_go_on(run_dir: Path) -> str:
    """The command that goes on with this run."""
    if record.read(run_dir, "run").get("tests"):
        return "the same command tests it again"
    if not (run_dir / "checkpoints" / "last.ckpt").exists():
        return "there was no checkpoint yet"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return f"the same sweep with hydra.sweep.dir={record.short(run_dir.parent)} goes on with it"
    program, *settings = (each for each in sys.argv if not each.startswith(("run.id=", "ckpt_path=", "hydra.run.dir=")))
    settings.append(_name(run_dir))
    if identity.launcher() == "srun":
        return f"go on with: sbatch slurm/train.sbatch {shlex.join(settings)}"
    if identity.launcher() == "torchrun":
        return f"go on with: torchrun ... {shlex.join([program, *settings])}, as before"
    return f"go on with: {shlex.join(['python', program, *settings])}"


def _name(run_dir: Path) -> str:
    """The setting that finds this run again, in quotes where Hydra wants them."""
    key, value = "hydra.run.dir", record.short(run_dir)
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
    console.print(record.summary(run_dir))


def _tell(line: str) -> None:
    print(line, flush=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
