"""Short runs in this process, as rank 0 of one, and what their networks computed in the test."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

from syncbn.training.launch import rank
from syncbn.training.run_directory import record
from tests.training.support.plain_lightning import as_of_torchrun
from tests.training.support.settled_config import settled

SHORT = ("logger=csv", "trainer.devices=1", "trainer.max_epochs=1", "+trainer.limit_train_batches=3")
SHORT += ("+trainer.limit_val_batches=1", "+trainer.limit_test_batches=3")
SEEN = "+callbacks.seen={_target_: tests.inference.support.trained_runs.Seen, path: %s}"


class Seen(pl.Callback):
    """Writes down the inputs and outputs of a network in the test, as the LightningModule calls it."""

    def __init__(self, path: str, part: str = "network") -> None:
        self.path, self.part, self.seen = path, part, []
        self.hook: Any = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hook = pl_module.get_submodule(self.part).register_forward_hook(self._keep)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.batch = None

    def _keep(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.seen.append((inputs[0].clone(), output.clone()))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.hook.remove()
        if trainer.is_global_zero:
            torch.save(self.seen, self.path)


def trained(where: Path, *overrides: str, name: str = "a") -> Path:
    """The directory of a short run."""
    run_dir = where / "outputs" / name
    checkpoints = f"callbacks.checkpoint.dirpath={run_dir}/checkpoints"
    plan = settled(*SHORT, SEEN % (where / "seen.pt"), checkpoints, *overrides, run_dir=run_dir)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's
    with as_of_torchrun(0, 1, store.port), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        record.begin(plan, name, list(overrides))
        rank.run(plan)
    record.end(run_dir, "finished")
    return run_dir


def seen(where: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and outputs of each batch of the last test."""
    return torch.load(where / "seen.pt", weights_only=True)


def assert_same_outputs(network: nn.Module, where: Path) -> None:
    """The network computes bitwise what that of the run computed in the test."""
    batches = seen(where)
    assert len(batches) > 1
    for x, y in batches:
        with torch.no_grad():
            assert torch.equal(network(x), y)
