"""The data. ``conf/data/images.yaml`` names it and sets its arguments."""

from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset, random_split

from syncbn.training.data import exact_loader, train_loader


class Images(pl.LightningDataModule):
    """Handwritten digits of scikit-learn, 1,797 grey images of 8x8. Replace :meth:`setup` to use your own images.

    Args:
        batch_size: samples per device.
        val_fraction: share of the images for validation; the same share is for the test.
        seed: of the split and of the training order.
    """

    def __init__(self, batch_size: int, val_fraction: float = 0.15, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.val_fraction, self.seed = batch_size, val_fraction, seed
        self.parts: list[Dataset[tuple[torch.Tensor, ...]]] = []

    def setup(self, stage: str) -> None:
        """Loads the images and splits them into training, validation and test, alike on all ranks."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        images = (images - images.mean()) / images.std()
        labels = torch.from_numpy(digits.target)
        shares = [1 - 2 * self.val_fraction, self.val_fraction, self.val_fraction]
        generator = torch.Generator().manual_seed(self.seed)
        self.parts = [*random_split(TensorDataset(images, labels), shares, generator)]

    def train_dataloader(self) -> Any:
        """Batches in a new order in each epoch; a run that is resumed continues in the middle of it."""
        return train_loader(self.parts[0], self.batch_size, seed=self.seed)

    def val_dataloader(self) -> Any:
        """Each image once, over any number of devices."""
        return exact_loader(self.parts[1], self.batch_size)

    def test_dataloader(self) -> Any:
        """Each image once, over any number of devices."""
        return exact_loader(self.parts[2], self.batch_size)
