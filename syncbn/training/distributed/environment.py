"""Reads from the environment variables which launcher started this process, its rank, and the name of its host."""

import os
import socket

from syncbn.training.distributed import slurm


def launcher() -> str | None:
    """What started this process as a rank: "torchrun" or "srun"; None if it is not a rank and starts ranks itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if slurm.is_task() else None


def rank() -> int:
    """The rank of this process; 0 if no launcher started it as a rank."""
    return int(os.environ.get("RANK", os.environ["SLURM_PROCID"] if slurm.is_task() else "0"))


def host() -> str:
    """The name of this machine; under srun its name in Slurm."""
    return (os.environ.get("SLURMD_NODENAME") if slurm.is_task() else None) or socket.gethostname()
