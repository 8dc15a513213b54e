"""Looks at what a run needs before it does anything, on every rank; and once more between the ranks.

What fails says what was found, what was expected, and how to mend it. Settings by themselves are checked before
(:func:`syncbn.training.config.validate.settle`).
"""

import os
import secrets
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from syncbn.training.atomic_write import unlinked
from syncbn.training.config import validate
from syncbn.training.config.schema import AgreedError, SettingError
from syncbn.training.distributed import unresponsive_ranks
from syncbn.training.run_directory import paths

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
    if world != validate.world_size(cfg):
        raise AgreedError(
            f"trainer.devices={cfg.trainer.devices} x trainer.num_nodes={cfg.trainer.num_nodes}: these are "
            f"{validate.world_size(cfg)} ranks, but the launcher started {world}; make them agree"
        )
    unresponsive_ranks.introduce()
    for lacks in paths.gathered("preflight", _lacks(cfg, run_dir), paths.START):
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


class CompareRanks(pl.Callback):
    """Between the ranks, before the first batch: what must be the same on all is.

    Args:
        cfg: settled settings.
        run_dir: the run directory.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path) -> None:
        self.cfg, self.run_dir = cfg, run_dir

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises:
        AgreedError: on every rank, and naming the ranks that differ.
        """
        if trainer.world_size == 1:
            return
        mine = self._about()
        everybody: list[dict[str, Any]] = [{} for _ in range(trainer.world_size)]
        dist.all_gather_object(everybody, mine)
        for name in mine:
            first = everybody[0][name]
            others = [rank for rank, each in enumerate(everybody) if each[name] != first]
            if others:
                rank = others[0]
                raise AgreedError(
                    f"{name}: rank {rank} has {everybody[rank][name]}, rank 0 {first}; start all ranks with the same"
                )
        self._same_directory(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same, where nothing was fitted."""
        if self.cfg.mode == "test":
            self.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises:
        AgreedError: ranks would train on unequally many batches, and wait for each other at the end.
        """
        loader = trainer.train_dataloader
        sizes: list[Any] = [None] * trainer.world_size
        if trainer.world_size == 1 or not isinstance(loader, DataLoader):
            return
        dist.all_gather_object(sizes, trainer.num_training_batches)
        if len(set(sizes)) > 1:
            raise AgreedError(
                f"data: the ranks have {', '.join(map(str, sizes))} batches an epoch; give each as many "
                "(syncbn.training.data.digits.train_loader does)"
            )

    def _about(self) -> dict[str, Any]:
        names = ("syncbn", "torch", "lightning")
        return {
            "world size": dist.get_world_size(),
            "package versions": ", ".join(f"{name} {version(name)}" for name in names),
            "seed": self.cfg.seed,
            "norm": validate.normalization_batch(self.cfg),
            "data.batch_size": self.cfg.data.batch_size,
            "ckpt_path": self.cfg.ckpt_path,
        }

    def _same_directory(self, trainer: pl.Trainer) -> None:
        """Nodes that each have a directory of this name would each keep a part of the run."""
        word = [secrets.token_hex(8)]
        mark = self.run_dir / ".same"
        if trainer.is_global_zero:
            unlinked(mark).write_bytes(word[0].encode())
        dist.broadcast_object_list(word)
        deadline = time.monotonic() + 10  # a network file system may be late
        expected = word[0].encode()
        while not (seen := mark.exists() and mark.read_bytes() == expected) and time.monotonic() < deadline:
            time.sleep(0.2)
        found: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(found, seen)
        if trainer.is_global_zero:
            mark.unlink()
        blind = [rank for rank, each in enumerate(found) if not each]
        if blind:
            raise AgreedError(
                f"hydra.run.dir={self.run_dir}: rank {', '.join(map(str, blind))} cannot see what rank 0 writes there; "
                "use a directory that all nodes share"
            )
