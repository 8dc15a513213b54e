"""Digits as a folder of PNGs, a folder a class, and a data set of them as torchvision's ImageFolder is one."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from syncbn.training import Digits
from syncbn.training.data.loaders import train_loader


class Images(Dataset):
    def __init__(self, folder: str) -> None:
        self.samples = [(str(path), int(path.parent.name)) for path in sorted(Path(folder).glob("*/*.png"))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        with Image.open(path) as image:
            return torch.as_tensor(np.array(image), dtype=torch.float32)[None] / 255, label


class Data(Digits):
    def __init__(self, folder: str, **options) -> None:
        super().__init__(**options)
        self.folder = folder

    def train_dataloader(self):
        return train_loader(Images(self.folder), self.batch_size, seed=self.seed, num_workers=self.num_workers)


if __name__ == "__main__":
    images, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(images[:200], labels[:200], strict=True)):
        path = Path(sys.argv[1]) / str(label) / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)).save(path)
