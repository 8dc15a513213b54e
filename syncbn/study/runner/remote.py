"""Runs that need another machine: checks their settings here and prints commands for that machine."""

import shlex
from pathlib import Path

from omegaconf import DictConfig

from syncbn.training import program
from syncbn.training.config.machine import Machine
from syncbn.training.config.plan import Plan
from syncbn.training.config.settle import settle
from syncbn.training.errors import SettingError
from syncbn.training.launch.run_pool import Run
from syncbn.training.run_directory import paths

# Settings that go to sbatch; train.py then reads them from srun.
SLURMS = ("trainer.num_nodes=", "trainer.devices=")
GPU = ("gpu", "cuda")


def settle_elsewhere(cfg: DictConfig, here: Machine, run_dir: Path) -> Plan:
    """:func:`syncbn.training.config.settle.settle` for a machine with enough GPUs.

    Raises:
        SettingError: a setting is invalid on every machine.
    """
    gpus, devices = here.gpus, cfg.trainer.devices
    if cfg.trainer.accelerator in GPU:
        if devices == "auto":
            raise SettingError(
                "trainer.devices", "auto", "the number of GPUs of another machine is unknown here; use a number"
            )
        gpus = max(devices, 1) if isinstance(devices, int) else 1
    return settle(cfg, Machine(gpus, here.cores), run_dir)


def refuse(cfg: DictConfig, here: Machine) -> None:
    """Raises a SettingError if this machine cannot execute the run: the run needs several nodes or more GPUs."""
    lists = "study.dry_run=true lists the runs as commands"
    nodes, devices = cfg.trainer.num_nodes, cfg.trainer.devices
    if nodes not in ("auto", 1):
        raise SettingError(
            "trainer.num_nodes",
            nodes,
            f"a study starts runs on one machine; {lists}, those of several nodes for Slurm, and once these have "
            "finished the same study does the rest",
        )
    if cfg.trainer.accelerator in GPU and here.gpus < (1 if devices == "auto" else devices):
        has = "no GPU" if not here.gpus else f"{here.gpus} GPU{'s' * (here.gpus > 1)}"
        raise SettingError(
            "trainer.accelerator=gpu and trainer.devices",
            devices,
            f"torch sees {has} here; {lists} for a machine that has them",
        )


def command(run: Run) -> str:
    """The command that starts a run ``python train.py`` or ``syncbn train``, for several nodes ``sbatch``."""
    where = f"hydra.run.dir={paths.short(run.directory)}"
    plan = run.plan
    if plan.num_nodes == 1:
        return shlex.join([*program.name().split(), *run.overrides, where])
    asks = [f"--nodes={plan.num_nodes}", f"--ntasks-per-node={plan.devices}"]
    if plan.accelerator == "gpu":
        asks.append(f"--gpus-per-node={plan.devices}")
    if workers := plan.cfg.data.get("num_workers"):
        asks.append(f"--cpus-per-task={workers + 1}")
    settings = [each for each in run.overrides if not each.startswith(SLURMS)]
    return shlex.join(["sbatch", *asks, "slurm/train.sbatch", *settings, where])
