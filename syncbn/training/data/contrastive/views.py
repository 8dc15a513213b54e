"""Two views of each image, for contrastive learning: what the data modules share."""

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

CLEAN_BATCH = 256  # images of a batch


class TwoViews(Dataset[Any]):
    """Pairs of differently augmented images with their label, ``(view_1, view_2, label)``.

    Args:
        images: a data set of ``(image, label)`` that augments by random draws.
    """

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]  # it has a length

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        first, label = self.images[index]
        second, _ = self.images[index]
        return first, second, label


def clean_loader(images: Dataset[Any]) -> DataLoader[Any]:
    """All images with their labels on each rank, in the order of the data set; it draws no random number."""
    return DataLoader(images, CLEAN_BATCH, generator=torch.Generator())
