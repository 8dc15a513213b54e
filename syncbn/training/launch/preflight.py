"""Looks at what a run needs before it does anything, on every rank; and once more between the ranks.

What fails says what was found, what was expected, and how to mend it. Settings by themselves are checked before
(:func:`syncbn.training.config.validate.settle`).
"""

import os
from pathlib import Path

import torch
from omegaconf import DictConfig

from syncbn.training.atomic_write import unlinked
from syncbn.training.config import derived
from syncbn.training.distributed import store, unresponsive_ranks
from syncbn.training.errors import AgreedError, SettingError

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def look(cfg: DictConfig, run_dir: Path) -> None:
    """Each rank by itself: launcher, run directory, precision. All ranks hear of what one of them lacks.

    Raises:
        AgreedError: at the first thing that cannot work.
    """
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        raise SettingError(f"launcher: {', '.join(missing)} not set; start with python train.py, torchrun or srun")
    world = int(os.environ["WORLD_SIZE"])
    if world != derived.world_size(cfg):
        raise AgreedError(
            f"trainer.devices={cfg.trainer.devices} x trainer.num_nodes={cfg.trainer.num_nodes}: these are "
            f"{derived.world_size(cfg)} ranks, but the launcher started {world}; make them agree"
        )
    unresponsive_ranks.introduce()
    for lacks in store.gathered("preflight", _lacks(cfg, run_dir), store.START):
        if lacks:
            raise AgreedError(lacks)


def _lacks(cfg: DictConfig, run_dir: Path) -> str:
    """What this rank cannot work with; empty where it can."""
    kept = run_dir / "checkpoints"
    for directory in (run_dir, kept) if kept.is_dir() else (run_dir,):
        draft = directory / f".rank-{os.environ['RANK']}"
        try:
            unlinked(draft).write_text("", encoding="utf-8")
            draft.unlink()
        except OSError as error:
            return (
                f"hydra.run.dir={run_dir}: rank {os.environ['RANK']} cannot write "
                f"{'there' if directory == run_dir else f'in {directory}'} ({error.strerror}); all ranks must"
            )
    precision = str(cfg.trainer.get("precision") or "32-true")
    if cfg.trainer.accelerator == "cpu" and precision.startswith("16"):
        return f"trainer.precision={precision}: float16 needs a GPU; on the CPU use 32-true, bf16-mixed or 64-true"
    if cfg.trainer.accelerator == "gpu" and precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
        return f"trainer.precision={precision}: this GPU has no bfloat16; use 16-mixed or 32-true"
    return ""
