"""From one command to all ranks of this machine and back: start them, watch them, say how it ended.

The process that was called is never a rank. torch's elastic agent (what torchrun is made of) starts the ranks, notices
one that dies, and stops the others. A rank gets the settled configuration from the run directory, so none composes its
own. Started by torchrun, which is such an agent already, a process is a rank at once.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

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


def main(cfg: DictConfig) -> None:
    """Runs one job under Hydra. A setting that cannot work, or a rank that fails, ends it with one line and code 1.

    ``HYDRA_FULL_ERROR=1`` gives the traceback instead.
    """
    try:
        config.settle(cfg)
        hydra = HydraConfig.get()
        run_dir = Path(hydra.runtime.output_dir)
        name = run_dir.name if hydra.mode == RunMode.RUN else f"{run_dir.parent.name}-{run_dir.name}"
        overrides = list(hydra.overrides.task)
        if dist.is_torchelastic_launched():
            _be_a_rank(cfg, run_dir, name, overrides)
        else:
            _start_ranks(cfg, run_dir, name, overrides)
    except SettingError as error:
        _stop(str(error))


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
    try:
        _launch(devices, run_dir, name, cfg.trainer.accelerator)
    except ChildFailedError as error:
        _mark_failed(cfg, run_dir, "failed")
        rank, failure = next(iter(error.failures.items()))
        _stop(_explain(rank, devices, failure, run_dir))
    except SignalException as error:
        _mark_failed(cfg, run_dir, "interrupted")
        _stop(f"stopped by {signal.Signals(error.sigval).name}; {_how_to_go_on(run_dir)}", 128 + error.sigval)
    record.end(run_dir, "finished")
    console.print(record.summary(run_dir))


def _launch(devices: int, run_dir: Path, name: str, accelerator: str) -> None:
    if accelerator == "cpu":  # the ranks share the cores; before they import torch
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    for name in list(logging.root.manager.loggerDict):  # what they say of a failure, _explain says in one line
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
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
    from syncbn.training import run

    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(cfg, DictConfig)
    try:
        run.run(cfg, run_dir)
    except RuntimeError as error:
        # When a rank dies the others' collectives fail within milliseconds. Let the agent see the cause first.
        if any(word in str(error) for word in ("Connection closed", "Connection reset", "gloo", "NCCL")):
            time.sleep(5)
        raise


def _be_a_rank(cfg: DictConfig, run_dir: Path, name: str, overrides: list[str]) -> None:
    from syncbn.training import run

    first = os.environ["RANK"] == "0"
    if first:
        record.begin(cfg, run_dir, name, overrides)
        print(record.headline(cfg), flush=True)
    try:
        run.run(cfg, run_dir)
    except BaseException:
        if first:
            record.end(run_dir, "failed")
        raise
    if first:
        record.end(run_dir, "finished")
        Console(soft_wrap=True, highlight=False).print(record.summary(run_dir))


def _mark_failed(cfg: DictConfig, run_dir: Path, status: str) -> None:
    record.end(run_dir, status)
    if record.read(run_dir, "wandb").get("finished") is False:  # rank 0 did not live to do it
        from syncbn.training import loggers

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


def _stop(message: str, code: int = 1) -> NoReturn:
    if os.environ.get("HYDRA_FULL_ERROR") == "1" and sys.exc_info()[1] is not None:
        raise
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
