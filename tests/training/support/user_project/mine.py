"""A user's own project: nothing here knows how syncbn trains; its classes come in by _target_."""

import json
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.utilities import prints


class Net(nn.Sequential):
    def __init__(self, hidden: int = 16, num_classes: int = 10) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )


class Lit(pl.LightningModule):
    """Its own network and optimizer; logs one number of its own."""

    def __init__(self, hidden: int, lr: float) -> None:
        super().__init__()
        self.net, self.lr = Net(hidden), lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", 0.5, sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("mine", 42.0, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Data(pl.LightningDataModule):
    """Plain loaders; Lightning shards them."""

    def __init__(self, batch_size: int, samples: int = 96) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(samples, 1, 8, 8, generator=generator)
        self.dataset = TensorDataset(x, torch.arange(samples) % 10)

    def train_dataloader(self):
        return DataLoader(self.dataset, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.dataset, self.batch_size)

    test_dataloader = val_dataloader


class Probe(pl.Callback):
    """Writes down which batch norm classes and flags a rank has before, in and after training, and what it learned."""

    def __init__(self, path: str, freeze: str | None = None) -> None:
        self.path, self.freeze, self.seen = path, freeze, {}

    def setup(self, trainer, pl_module, stage):
        if self.freeze and stage.value == "fit":
            pl_module.get_submodule(self.freeze).eval()
        self._look(f"setup_{stage.value}", pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._look("batch", pl_module)  # the last one stays
        self.seen["kinds"] = sorted({type(m).__name__ for m in pl_module.modules()})

    def on_train_epoch_end(self, trainer, pl_module):
        self._look("train", pl_module)

    def teardown(self, trainer, pl_module, stage):
        self._look(f"teardown_{stage.value}", pl_module)
        file = Path(f"{self.path}.{trainer.global_rank}.json")
        if stage.value == "test" and file.exists():  # of the fit, which has a callback of its own
            self.seen = json.loads(file.read_text(encoding="utf-8")) | self.seen
        file.write_text(json.dumps(self.seen), encoding="utf-8")
        torch.save(pl_module.state_dict(), f"{self.path}.{trainer.global_rank}.pt")

    def _look(self, when, pl_module):
        self.seen[when] = {
            name: [type(m).__name__, m.training, m.running_mean.double().sum().item()]
            for name, m in pl_module.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        }


class Spoil(pl.Callback):
    """Puts a nan into one rank's batch at one step; `inputs: false` puts an inf into a weight instead."""

    def __init__(self, rank: int, step: int, inputs: bool = True) -> None:
        self.rank, self.step, self.inputs = rank, step, inputs

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if self.inputs:
                batch[0][0] = float("nan")
            else:
                next(iter(pl_module.parameters())).data[0] = float("inf")


class Speak(pl.Callback):
    """Says a word on rank 0, as Lightning and torchmetrics do it."""

    def setup(self, trainer, pl_module, stage):
        if stage.value == "fit":
            rank_zero_warn("a word by Lightning")
            prints.rank_zero_warn("a word by torchmetrics")
