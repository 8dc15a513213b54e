"""Compares what must be equal on all ranks before they train."""

import secrets
import time
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch.utils.data import DataLoader

from syncbn.training.atomic_write import unlinked
from syncbn.training.config.plan import Plan
from syncbn.training.errors import AgreedError


class CompareRanks(pl.Callback):
    """Compares the ranks before the first batch.

    Args:
        plan: of the run, as this rank has it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.run_dir = plan, plan.run_dir

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
                    name,
                    hint=f"rank {rank} has {everybody[rank][name]}, rank 0 {first}; start all ranks with the same",
                )
        self._same_directory(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same, where nothing was fitted."""
        if self.plan.cfg.mode == "test":
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
                "data",
                hint=f"the ranks have {', '.join(map(str, sizes))} batches an epoch; give each as many "
                "(syncbn.training.data.train_loader does)",
            )

    def _about(self) -> dict[str, Any]:
        names = ("syncbn", "torch", "lightning")
        return {
            "world size": dist.get_world_size(),
            "package versions": ", ".join(f"{name} {version(name)}" for name in names),
            "seed": self.plan.cfg.seed,
            "norm": self.plan.normalization_batch,
            "data.batch_size": self.plan.batch_size,
            "ckpt_path": self.plan.checkpoint,
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
                "hydra.run.dir",
                self.run_dir,
                f"rank {', '.join(map(str, blind))} cannot see what rank 0 writes there; use a directory that all "
                "nodes share",
            )
