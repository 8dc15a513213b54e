"""The peak memory of a run: of the rank that used most."""

import resource
import sys
from typing import Any

import torch
import torch.distributed as dist


def peak_memory(accelerator: str) -> dict[str, Any]:
    """The peak memory so far, over all ranks; a collective.

    On a GPU it is what torch's allocator had given out (``torch.cuda.max_memory_allocated``), without the CUDA context
    and cached blocks. On the CPU it is the resident memory of the rank's process, with the libraries in it, and
    without loader workers.

    Args:
        accelerator: "gpu" or "cpu".

    Returns:
        ``memory/peak`` in bytes, ``memory/rank``, the rank that used it, and ``of``: "GPU" or "process".
    """
    mine = torch.cuda.max_memory_allocated() if accelerator == "gpu" else _resident()
    ranks: list[Any] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    peak = max(ranks)
    return {"memory/peak": peak, "memory/rank": ranks.index(peak), "of": "GPU" if accelerator == "gpu" else "process"}


def _resident() -> int:
    """Bytes; Linux counts ``ru_maxrss`` in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def described(memory: dict[str, Any]) -> str:
    """The peak in one line, for the table at the end of a run."""
    where = "on the GPU" if memory["of"] == "GPU" else "in the process"
    return f"{memory['memory/peak'] / 2**20:,.0f} MiB at most {where} of a rank (rank {memory['memory/rank']})"
