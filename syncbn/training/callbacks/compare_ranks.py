"""Checks before training that all ranks have the same settings, package versions, run directory and batch count."""

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
    """Compares the ranks before the first batch and stops the run if they differ."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare settings, package versions and the run directory of all ranks.

        Raises:
            AgreedError: on every rank; it names a rank that differs from rank 0.
        """
        if trainer.world_size == 1:
            return
        first, *others = of_all_ranks(trainer, self._values())
        for name, value in first.items():
            for rank, other in enumerate(others, 1):
                if other[name] != value:
                    raise AgreedError(
                        name,
                        hint=f"rank {rank} has {other[name]}, rank 0 has {value}; start all ranks with the same value",
                    )
        self._check_shared_directory(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the ranks in ``mode=test``, where ``on_fit_start`` does not run."""
        if self.plan.cfg.mode == "test":
            self.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the number of training batches: with unequal numbers, some ranks would wait forever in a collective.

        Raises:
            AgreedError: the ranks have different numbers of batches.
        """
        if not isinstance(trainer.train_dataloader, DataLoader):
            return
        sizes = of_all_ranks(trainer, trainer.num_training_batches)
        if len(set(sizes)) > 1:
            raise AgreedError(
                "data",
                hint=f"the ranks have {', '.join(map(str, sizes))} batches per epoch; use a loader with the same "
                "number on each rank (syncbn.training.data.train_loader)",
            )

    def _values(self) -> dict[str, Any]:
        """The values that must be equal on all ranks, by name."""
        names = ("syncbn", "torch", "lightning")
        return {
            "world size": dist.get_world_size(),
            "package versions": ", ".join(f"{name} {version(name)}" for name in names),
            "seed": self.plan.cfg.seed,
            "norm": self.plan.normalization_batch,
            "data.batch_size": self.plan.batch_size,
            "ckpt_path": self.plan.checkpoint,
        }

    def _check_shared_directory(self, trainer: pl.Trainer) -> None:
        """Check that all ranks see the same run directory.

        Two nodes may each have a local directory of this name; each would then hold a part of the run. Rank 0 writes a
        random token into a file, and every rank checks that it can read the token.
        """
        token = [secrets.token_hex(8).encode()]
        marker = self.plan.run_dir / ".same"
        if trainer.is_global_zero:
            unlinked(marker).write_bytes(token[0])
        dist.broadcast_object_list(token)
        deadline = time.monotonic() + 10  # on a network file system the file may become visible late
        while not (seen := marker.exists() and marker.read_bytes() == token[0]) and time.monotonic() < deadline:
            time.sleep(0.2)
        failing = [rank for rank, saw in enumerate(of_all_ranks(trainer, seen)) if not saw]
        if trainer.is_global_zero:
            marker.unlink()
        if failing:
            raise AgreedError(
                "hydra.run.dir",
                self.plan.run_dir,
                f"rank {', '.join(map(str, failing))} cannot see the files that rank 0 writes there; use a directory "
                "that all nodes share",
            )


def of_all_ranks(trainer: pl.Trainer, value: Any) -> list[Any]:
    """The values of all ranks, by rank; a collective."""
    values = [value]
    if trainer.world_size > 1:
        values = [None] * trainer.world_size
        dist.all_gather_object(values, value)
    return values
