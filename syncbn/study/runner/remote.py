"""Runs for another machine than this one: checked here as far as that goes, and put into commands for there."""

import shlex

import torch
from omegaconf import DictConfig

from syncbn.training.config import validate
from syncbn.training.errors import SettingError
from syncbn.training.launch.run_pool import Run
from syncbn.training.run_directory import paths

# What sbatch is told, and train.py then takes from srun.
SLURMS = ("trainer.num_nodes=", "trainer.devices=")


def settle(cfg: DictConfig) -> None:
    """:func:`syncbn.training.config.validate.settle` for a machine that has the GPUs which the settings want.

    Raises:
        SettingError: at the first setting that cannot work there either.
    """
    wanted = cfg.trainer.accelerator
    if wanted in ("gpu", "cuda"):
        if cfg.trainer.devices == "auto":
            raise SettingError(
                "trainer.devices", "auto", "the number of GPUs of another machine is unknown here; use a number"
            )
        cfg.trainer.accelerator = "cpu"  # whose processes stand for GPUs in all that is checked
    validate.settle(cfg)
    if wanted in ("gpu", "cuda"):
        cfg.trainer.accelerator = "gpu"


def refuse(cfg: DictConfig) -> None:
    """Refuses a run that this machine cannot do by itself.

    Args:
        cfg: composed settings, not settled yet.

    Raises:
        SettingError: it wants more nodes than one, or more GPUs than there are.
    """
    lists = "study.dry_run=true lists the runs as commands"
    nodes, devices = cfg.trainer.num_nodes, cfg.trainer.devices
    if nodes not in ("auto", 1):
        raise SettingError(
            "trainer.num_nodes",
            nodes,
            f"a study starts runs on one machine; {lists}, those of several nodes for Slurm, and once these have "
            "finished the same study does the rest",
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cfg.trainer.accelerator in ("gpu", "cuda") and gpus < (1 if devices == "auto" else devices):
        has = "no GPU" if not gpus else f"{gpus} GPU{'s' * (gpus > 1)}"
        raise SettingError(
            "trainer.accelerator=gpu and trainer.devices",
            devices,
            f"torch sees {has} here; {lists} for a machine that has them",
        )


def command(run: Run) -> str:
    """What does a run, from the repository's directory: ``python train.py``, or for several nodes ``sbatch``."""
    where = f"hydra.run.dir={paths.short(run.directory)}"
    trainer = run.cfg.trainer
    if trainer.num_nodes == 1:
        return shlex.join(["python", "train.py", *run.overrides, where])
    asks = [f"--nodes={trainer.num_nodes}", f"--ntasks-per-node={trainer.devices}"]
    if trainer.accelerator == "gpu":
        asks.append(f"--gpus-per-node={trainer.devices}")
    if workers := run.cfg.data.get("num_workers"):
        asks.append(f"--cpus-per-task={workers + 1}")
    settings = [each for each in run.overrides if not each.startswith(SLURMS)]
    return shlex.join(["sbatch", *asks, "slurm/train.sbatch", *settings, where])
