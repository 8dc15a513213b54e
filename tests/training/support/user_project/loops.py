"""Trainings that are not ours in some way, and are to resume all the same; all by _target_."""

import subprocess
from pathlib import Path

import faults
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from syncbn.training import Digits
from syncbn.training.data.loaders import train_loader


class Draws(pl.Callback):
    """Draws random numbers wherever a callback can."""

    def on_train_start(self, *_):
        torch.rand(1)

    def on_train_batch_end(self, *_):
        torch.rand(3)

    on_train_epoch_start = on_train_epoch_end = on_train_start


class Plain(Digits):
    """A loader that knows no place in the epoch."""

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)


class Stream:
    """Batches whose number nobody knows before; it can say how many it has given."""

    def __init__(self, dataset, batch_size):
        self.dataset, self.batch_size, self.given = dataset, batch_size, 0

    def __iter__(self):
        while self.given < len(self.dataset) // self.batch_size:
            self.given += 1
            cut = slice((self.given - 1) * self.batch_size, self.given * self.batch_size)
            yield [tensor[cut] for tensor in self.dataset.tensors]
        self.given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class Streamed(Digits):
    def train_dataloader(self):
        return Stream(self.train, self.batch_size)


class Lit(faults.Lit):
    """Keeps its arguments in checkpoints, as Lightning's users do, and logs something with the first batch alone."""

    def __init__(self, network, optimizer, **rest) -> None:
        super().__init__(network, optimizer, **rest)
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.log("train/first", float(self.current_epoch + 1), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Object(pl.Callback):
    """Puts into the checkpoint what is no plain data."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["mine"] = Path("somewhere")


class FromFiles(torch.utils.data.Dataset):
    """Each image wants the file of its label."""

    def __init__(self, dataset, directory):
        self.dataset, self.directory = dataset, Path(directory)
        self.directory.mkdir(exist_ok=True)
        for name in range(10):
            torch.save(name, self.directory / f"{name}.pt")

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        x, y = self.dataset[i]
        assert torch.load(self.directory / f"{y}.pt") == int(y)
        return x, y


class Files(Digits):
    """``ours``: read by our loader, else by torch's."""

    def __init__(self, directory, ours, **options):
        super().__init__(**options)
        self.directory, self.ours = directory, ours

    def train_dataloader(self):
        dataset = FromFiles(self.train, self.directory)
        if self.ours:
            return train_loader(dataset, self.batch_size, seed=self.seed, num_workers=self.num_workers)
        return DataLoader(dataset, self.batch_size, shuffle=True, num_workers=self.num_workers)


class Removes(pl.Callback):
    """Removes a file in the second epoch."""

    def __init__(self, path):
        self.path = Path(path)

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 1:
            self.path.unlink(missing_ok=True)


class ReadOnly(pl.Callback):
    """Makes the file system of the working directory read-only, once."""

    def __init__(self, once):
        self.once = Path(once)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 6 and not self.once.exists():
            self.once.touch()
            here = str(Path.cwd())
            # A mount with files that are open for writing stays writable, so it is a second one, above the first.
            subprocess.run(["mount", "--bind", here, here], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", here], check=True)
