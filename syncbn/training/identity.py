"""A run's name and directory, made once for all of its processes."""

import os
import secrets
from datetime import timedelta
from functools import cache
from pathlib import Path
from time import strftime

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not by name


def run_dir(parent: str, ckpt_path: str | None) -> str:
    """The directory of a run: the one that ``ckpt_path`` lies in, where it goes on from there, else a new one."""
    if ckpt_path is not None and Path(ckpt_path).is_file():
        earlier = run_of(Path(ckpt_path))
        if earlier is not None:
            return str(earlier)
    return str(Path(parent) / run_id())


def run_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in."""
    return next((d for d in checkpoint.resolve().parents if (d / "run.json").exists()), None)


@cache
def run_id() -> str:
    """Date, time and a few random letters, as in ``20260131-235959-3f9c``; ``SYNCBN_RUN_ID`` overrides it.

    Under torchrun every rank composes its own configuration, so rank 0's answer goes through the launcher's store.
    """
    if "SYNCBN_RUN_ID" in os.environ:
        return os.environ["SYNCBN_RUN_ID"]
    new = f"{strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if not dist.is_torchelastic_launched():
        return new
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not agent:
        raise RuntimeError("this torchrun keeps no store: give the run a name with SYNCBN_RUN_ID=...")
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
    key = f"syncbn/run_id/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if os.environ["RANK"] == "0":
        store.set(key, new)
    return str(store.get(key).decode())
