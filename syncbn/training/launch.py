"""From one command to all ranks of this machine and back: start them, watch them, say how it ended.

The process that was called is never a rank. torch's elastic agent (what torchrun is made of) starts the ranks, notices
one that dies, and stops the others. A rank gets the settled configuration from the run directory, so none composes its
own. Started by torchrun, which is such an agent already, a process is a rank at once.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from syncbn.training import config, record
from syncbn.training.config import SettingError
from syncbn.training.identity import run_dir as find_run_dir

config.register()
OmegaConf.register_new_resolver("run_dir", find_run_dir)


class RunError(RuntimeError):
    """The ranks came to a bad end; what there was to say has been said."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def main(cfg: DictConfig) -> None:
    """Runs one job under Hydra. A setting that cannot work, or a rank that fails, ends it with one line and code 1.

    ``HYDRA_FULL_ERROR=1`` gives the traceback instead.
    """
    hydra = HydraConfig.get()
    try:
        config.settle(cfg)
        run_dir = Path(hydra.runtime.output_dir)
        name = run_dir.name if hydra.mode == RunMode.RUN else f"{run_dir.parent.name}-{run_dir.name}"
        overrides = list(hydra.overrides.task)
        if dist.is_torchelastic_launched():
            _be_a_rank(cfg, run_dir, name, overrides)
        else:
            _start_ranks(cfg, run_dir, name, overrides)
    except (SettingError, RunError) as error:
        if isinstance(error, SettingError) and os.environ.get("RANK", "0") == "0":
            _say(str(error))
        code = getattr(error, "code", 1)
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or (hydra.mode == RunMode.MULTIRUN and code == 1):
            raise  # Hydra goes on with the sweep, and ends it with this
        sys.exit(code)


def _start_ranks(cfg: DictConfig, run_dir: Path, name: str, overrides: list[str]) -> None:
    nodes, devices = cfg.trainer.num_nodes, cfg.trainer.devices
    if nodes > 1:
        raise SettingError(
            f"trainer.num_nodes={nodes}: python train.py starts the ranks of one machine; on each node call "
            f"torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d --rdzv-endpoint=HOST train.py"
        )
    record.begin(cfg, run_dir, name, overrides)
    console = Console(soft_wrap=True, highlight=False)
    console.print(record.headline(cfg))
    status, stop = "failed", None
    try:
        _launch(devices, run_dir, name)
        status = "finished"
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        stop = RunError(_explain(rank, devices, failure, run_dir))
        raise stop from error
    except SignalException as error:
        status = "interrupted"
        stop = RunError(f"stopped by {error.sigval.name}; {_how_to_go_on(run_dir)}", 128 + error.sigval)
        raise stop from error
    finally:
        if stop is not None:
            _say(str(stop))
        record.end(run_dir, status)
        if status != "finished":
            _close_wandb(cfg, run_dir)
    console.print(record.summary(run_dir))


def _launch(devices: int, run_dir: Path, name: str) -> None:
    for logger in list(logging.root.manager.loggerDict):  # what they say of a failure, _explain says in one line
        if logger.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(str(run_dir / "ranks"), redirects=dict.fromkeys(range(1, devices), Std.ALL)),
    )
    elastic_launch(settings, _rank)(run_dir)


def _rank(run_dir: Path) -> None:
    """The entry point of a rank that this module started."""
    run = _import_run()
    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    try:
        run(cfg, run_dir)
    except RuntimeError as error:
        # When a rank dies the others' collectives fail within milliseconds. Let the agent see the cause first.
        if any(word in str(error) for word in ("Connection closed", "Connection reset", "gloo", "NCCL")):
            time.sleep(5)
        raise


def _be_a_rank(cfg: DictConfig, run_dir: Path, name: str, overrides: list[str]) -> None:
    run = _import_run()
    first = os.environ["RANK"] == "0"
    if first:
        record.begin(cfg, run_dir, name, overrides)
        print(record.headline(cfg), flush=True)
    try:
        run(cfg, run_dir)
    except BaseException:
        if first:
            record.end(run_dir, "failed")
        raise
    if first:
        record.end(run_dir, "finished")
        Console(soft_wrap=True, highlight=False).print(record.summary(run_dir))


def _import_run() -> Callable[[DictConfig, Path], None]:
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


def _close_wandb(cfg: DictConfig, run_dir: Path) -> None:
    """Marks the W&B run as failed, where rank 0 did not live to do it; that a server is gone is no news by now."""
    if record.read(run_dir, "wandb").get("finished") is False:
        from syncbn.training import loggers

        with suppress(SettingError):
            loggers.mark_failed(cfg, run_dir)


def _explain(rank: int, ranks: int, failure: ProcessFailure, run_dir: Path) -> str:
    """One line on why a rank failed; its traceback goes into the run directory."""
    if failure.exitcode < 0:
        killed = f"rank {rank} of {ranks} (pid {failure.pid}) was killed by {failure.signal_name()}"
        return f"{killed}; {_how_to_go_on(run_dir)}"
    message = failure.error_file_data["message"]
    if isinstance(message, str):
        return f"rank {rank} of {ranks} ended with exit code {failure.exitcode}: {message}"
    said = message["message"]
    if said.startswith(f"{SettingError.__name__}: "):
        return str(said.removeprefix(f"{SettingError.__name__}: "))
    trace = run_dir / "error.txt"
    trace.write_text(message["extraInfo"]["py_callstack"])
    return f"rank {rank} of {ranks} failed: {' '.join(said.split())[:500]} (traceback: {trace})"


def _how_to_go_on(run_dir: Path) -> str:
    last = run_dir / "checkpoints" / "last.ckpt"
    return f"go on with ckpt_path={last}" if last.exists() else "there was no checkpoint yet"


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
