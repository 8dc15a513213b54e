"""Describes the machine that settings are checked against: GPUs, CPU cores, and the processes of a launcher."""

import os
from dataclasses import dataclass

import torch

from syncbn.training.distributed import environment, slurm


@dataclass(frozen=True)
class Launched:
    """The processes that torchrun or srun started, this one among them."""

    by: str  # "torchrun" or "srun"
    num_nodes: int
    devices: int  # processes per node


@dataclass(frozen=True)
class Machine:
    """The resources that a run has to fit."""

    gpus: int  # that torch sees
    cores: int
    launched: Launched | None = None  # None if no launcher started this process, so that it starts the ranks itself


def this_machine() -> Machine:
    """Describes the machine and the launcher of this process.

    Under srun this sets the environment variables that torchrun would set.

    Raises:
        SettingError: the Slurm job was requested in a way that cannot work; the hint has the right header.
    """
    slurm.check()
    by, launched = environment.launcher(), None
    if by == "srun":
        slurm.join()
    if by is not None:
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        launched = Launched(by, int(os.environ["WORLD_SIZE"]) // per_node, per_node)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(gpus, os.cpu_count() or 1, launched)
