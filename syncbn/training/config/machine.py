"""Describes the machine that settings are checked against: GPUs, CPU cores, and the processes of a launcher."""

import os
from dataclasses import dataclass

import torch

from syncbn.training.distributed import environment, slurm


@dataclass(frozen=True)
class Launched:
    """The processes that torchrun or srun started, this one among them.

    Attributes:
        by: "torchrun" or "srun".
        num_nodes: how many nodes.
        devices: processes per node.
    """

    by: str
    num_nodes: int
    devices: int


@dataclass(frozen=True)
class Machine:
    """The resources that a run has to fit.

    Attributes:
        gpus: how many GPUs torch sees.
        cores: CPU cores.
        launched: None if no launcher started this process, so that it starts the ranks itself.
    """

    gpus: int
    cores: int
    launched: Launched | None = None


def this_machine() -> Machine:
    """Describes the machine and the launcher of this process.

    Under srun this sets the environment variables that torchrun would set.

    Raises:
        SettingError: the Slurm job was requested in a way that cannot work; the hint has the right header.
    """
    slurm.check()
    by = environment.launcher()
    if by == "srun":
        slurm.join()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(gpus, os.cpu_count() or 1, None if by is None else _launched(by))


def _launched(by: str) -> Launched:
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    return Launched(by, int(os.environ["WORLD_SIZE"]) // per_node, per_node)
