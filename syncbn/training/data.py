"""Data: the digits as a LightningDataModule, and loaders that are exact on every world size."""

from collections.abc import Callable, Iterator, Sequence, Sized
from math import ceil
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, default_collate

from syncbn.training.config import SettingError


class Digits(pl.LightningDataModule):
    """scikit-learn's handwritten digits: 1,797 real images of shape ``(1, 8, 8)``, values in [0, 1], 10 classes.

    Args:
        batch_size: per device.
        val_fraction: share of the images for validation, stratified by class.
        test_fraction: share of the images for the test, stratified by class.
        split_seed: of the split.
        shuffle: a new order in each epoch of training.
        seed: of the order in training.
        num_workers: loader processes per device.

    Raises:
        SettingError: at set-up, where the training images do not fill one global batch or a part has fewer images than
            there are devices.
    """

    def __init__(
        self,
        batch_size: int = 32,
        *,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise SettingError(
                f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction}: "
                "each must be above 0, and their sum below 1"
            )
        self.batch_size, self.num_workers = batch_size, num_workers
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.split_seed, self.shuffle, self.seed = split_seed, shuffle, seed

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        y = torch.as_tensor(labels, dtype=torch.long)
        rest, test = _stratified(range(len(y)), y, self.test_fraction, self.split_seed)
        train, val = _stratified(rest, y, self.val_fraction / (1 - self.test_fraction), self.split_seed)
        self.train, self.val, self.test = (TensorDataset(x[part], y[part]) for part in (train, val, test))

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader(
            self.train, self.batch_size, shuffle=self.shuffle, seed=self.seed, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return exact_loader(self.val, self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        return exact_loader(self.test, self.batch_size, num_workers=self.num_workers)


def train_loader(
    dataset: Dataset[Any], batch_size: int, *, shuffle: bool = True, seed: int = 0, **options: Any
) -> DataLoader[Any]:
    """Full batches, in a new order each epoch; a global batch holds the same samples on any number of ranks.

    Args:
        dataset: map-style; what is left over after the last full global batch waits for another epoch's order.
        batch_size: per rank.
        shuffle: a new order in each epoch.
        seed: of the order.
        options: further arguments of DataLoader.

    Raises:
        SettingError: fewer samples than one global batch.
    """
    ranks, samples = _world_size(), len(cast(Sized, dataset))
    if samples < batch_size * ranks:
        raise SettingError(
            f"data.batch_size={batch_size}: a global batch is {batch_size * ranks} samples ({batch_size} on each of "
            f"{ranks} devices), but the training set has {samples}; use at most {samples // ranks}"
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=ranks, rank=_rank(), shuffle=shuffle, seed=seed, drop_last=True
    )
    return DataLoader(dataset, batch_size, sampler=sampler, drop_last=True, **options)


def exact_loader(
    dataset: Dataset[Any], batch_size: int, *, collate_fn: Callable[[list[Any]], Any] = default_collate, **options: Any
) -> DataLoader[Any]:
    """Every sample once, on exactly one rank, in equally many batches on each: for validation and test.

    Args:
        dataset: map-style.
        batch_size: per rank, at most (see :class:`ExactSampler`).
        collate_fn: makes a batch of a list of samples.
        options: further arguments of DataLoader.
    """
    sampler = ExactSampler(dataset, batch_size)
    return DataLoader(_Batches(dataset, collate_fn), batch_size=None, sampler=sampler, **options)


class ExactSampler(DistributedSampler[Any]):
    """Deals every sample to exactly one rank and gives each rank equally many batches, none of them empty.

    The usual sampler repeats samples until all ranks have as many (5 samples on 2 ranks are counted as 6), and a metric
    counts the repeated ones. Here the batches are of unequal size instead, by one sample at most between ranks. Equally
    many they must be, as a forward pass through DistributedDataParallel is a message. It is a
    DistributedSampler so that Lightning leaves it in place.

    Yields lists of indices, so the DataLoader must not batch (``batch_size=None``).

    Args:
        dataset: map-style.
        batch_size: the most samples in a batch; but where it is 1 and the samples do not divide evenly, a batch has 2.
        num_replicas: ranks; of the process group if None.
        rank: this one; of the process group if None.

    Raises:
        SettingError: fewer samples than ranks.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, num_replicas: int | None = None, rank: int | None = None
    ) -> None:
        ranks = _world_size() if num_replicas is None else num_replicas
        super().__init__(dataset, ranks, _rank() if rank is None else rank, shuffle=False)
        samples = len(cast(Sized, dataset))
        if samples < ranks:
            raise SettingError(
                f"trainer.devices: {ranks} in all, but {samples} samples to evaluate on; use at most {samples}"
            )
        # As many batches as the largest share needs, but no more than the smallest share can fill.
        self.num_batches = min(ceil(ceil(samples / ranks) / batch_size), samples // ranks)

    def __iter__(self) -> Iterator[Any]:
        share = torch.arange(self.rank, len(cast(Sized, self.dataset)), self.num_replicas)
        return iter([batch.tolist() for batch in share.tensor_split(self.num_batches)])

    def __len__(self) -> int:
        return self.num_batches


class _Batches(Dataset[Any]):
    """Whole batches of a dataset, by lists of indices."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, indices: list[int]) -> Any:
        return self.collate([self.dataset[i] for i in indices])


def _stratified(indices: Sequence[int], labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """``indices`` in two, the second with this share of every class."""
    large, small = train_test_split(
        list(indices), test_size=fraction, random_state=seed, stratify=labels[list(indices)]
    )
    return large, small


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
