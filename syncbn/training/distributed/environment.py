"""Who started this process, its rank, and the name of its host."""

import os
import socket

from syncbn.training.distributed import slurm


def launcher() -> str | None:
    """Who started this process as a rank: torchrun, srun, or nobody: then it starts ranks itself."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if slurm.is_task() else None


def rank() -> int:
    """This process's rank; 0 where nobody started it as one."""
    return int(os.environ.get("RANK", os.environ["SLURM_PROCID"] if slurm.is_task() else "0"))


def host() -> str:
    """The machine that this process runs on; under srun by the name that Slurm has for it."""
    return (os.environ.get("SLURMD_NODENAME") if slurm.is_task() else None) or socket.gethostname()
