"""Trainings that are not ours in some way, and are to resume all the same; all by _target_."""

from pathlib import Path

import faults
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from syncbn.training import Digits


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
