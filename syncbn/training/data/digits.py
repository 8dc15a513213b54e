"""The LightningDataModule of scikit-learn's handwritten digits, with shards, corruptions and label noise."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from syncbn.training.data import corruptions
from syncbn.training.data.image_data import ImageSet, check_soft_targets
from syncbn.training.data.label_noise import check_share, relabelled, with_outliers
from syncbn.training.data.loaders import exact_loader, loader_options, train_loader
from syncbn.training.data.samplers import check_remainder
from syncbn.training.data.shards import check as check_shards
from syncbn.training.data.shards import collate as collate_shards
from syncbn.training.data.shards import evaluation_shards, train_shards
from syncbn.training.data.transforms import augmentation, mixing
from syncbn.training.data.transforms.augmentation import Augmentation
from syncbn.training.data.transforms.mixing import Mix
from syncbn.training.errors import SettingError


class Digits(pl.LightningDataModule):
    """scikit-learn's handwritten digits: 1,797 real images of shape ``(1, 8, 8)``, values in [0, 1], 10 classes.

    Args:
        batch_size: samples per device and step.
        val_fraction: share of the images for validation, stratified by class.
        test_fraction: share of the images for the test, stratified by class.
        split_seed: seed of the split.
        shuffle: whether each training epoch has a new order.
        seed: seed of the training order.
        num_workers: loader processes per device.
        remainder: treatment of the training images after the last full global batch (see :func:`train_loader`).
        shards: property in which the devices' training images differ: "labels", "brightness" or "inversion"; None for
            a random distribution of images. Validation and test have every image in every domain (see
            :mod:`syncbn.training.data.shards`).
        num_shards: number of shards, a divisor of the number of devices; device r has shard r modulo ``num_shards``.
        corruption: corruption of the test images, one of ``corruptions.KINDS``; None for none. Each image has its own
            random draws, seeded by ``split_seed``.
        severity: severity of the corruption, 1 to 5; None is 3.
        corrupt_train: whether to corrupt the images of training and validation too.
        label_noise: share of the training images that get the label of another class; None is 0. ``seed`` determines
            the images and labels, once for all epochs. Labels of validation and test are unchanged.
        outliers: share of the training images that are multiplied by ``outlier_scale``, drawn in the same way; None is
            0.
        outlier_scale: factor for outliers; None is 10.
        augment: the settings of ``conf/augment``; None for none.
        mix: the settings of ``conf/mix``; None for none.
        balance: whether each epoch draws equally many images of each class.
        num_classes, in_channels: facts of the digits, 10 and 1; nothing else is accepted.
        loader: further arguments of :func:`~syncbn.training.data.loaders.loader_options`.

    Images are corrupted first, then wrong labels and outliers are drawn, then shards are made. With "labels" an image
    is therefore in the shard of its (possibly wrong) label.

    Raises:
        SettingError: unknown ``remainder``, ``shards`` or ``corruption``; a severity outside 1 to 5, or without a
            corruption; a share outside 0 to 1; fewer than two shards; when the loaders are made, if the training images
            do not fill one global batch or another part has fewer images than there are devices.
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
        remainder: str = "drop",
        shards: str | None = None,
        num_shards: int | None = None,
        corruption: str | None = None,
        severity: int | None = None,
        corrupt_train: bool | None = None,
        label_noise: float | None = None,
        outliers: float | None = None,
        outlier_scale: float | None = None,
        augment: dict[str, Any] | None = None,
        mix: dict[str, Any] | None = None,
        balance: bool = False,
        num_classes: int = 10,
        in_channels: int = 1,
        **loader: Any,
    ) -> None:
        super().__init__()
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise SettingError(
                f"data.val_fraction={val_fraction} and data.test_fraction",
                test_fraction,
                "each must be above 0, and their sum below 1",
            )
        check_remainder(remainder)
        check_shards(shards, num_shards)
        for name, given, fact in (("num_classes", num_classes, 10), ("in_channels", in_channels, 1)):
            if given != fact:
                raise SettingError(f"data.{name}", given, f"the digits have {fact}; leave it out")
        self.num_workers = num_workers  # subclasses read it
        self.options = loader_options(num_workers, **loader)
        self.augment = None if augment is None else Augmentation(augmentation.check(augment), (8, 8))
        self.mix = None if mix is None else Mix(mixing.check(mix), 10)
        mixing.check_batch(mix, batch_size)
        self.balance, self.class_counts = bool(balance), list[int]()
        self.corruption, self.severity = corruption, 3 if severity is None else severity
        if corruption is not None:
            corruptions.check(corruption, self.severity, ("data.corruption", "data.severity"))
        for name, value in (("severity", severity), ("corrupt_train", corrupt_train or None)):
            if corruption is None and value is not None:
                first = corruptions.KINDS[0]
                raise SettingError(
                    f"data.{name}", value, f"no corruption is set; use data.corruption={first} or another"
                )
        self.corrupt_train, self.label_noise, self.outliers = bool(corrupt_train), label_noise or 0, outliers or 0
        check_share("data.label_noise", self.label_noise)
        check_share("data.outliers", self.outliers)
        self.outlier_scale = 10.0 if outlier_scale is None else outlier_scale
        if isinstance(self.outlier_scale, bool) or not isinstance(self.outlier_scale, int | float):
            raise SettingError("data.outlier_scale", outlier_scale, "use a number")
        self.shards, self.num_shards = shards, num_shards
        self.parts: list[list[int]] | None = None
        self.batch_size, self.remainder = batch_size, remainder
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.split_seed, self.shuffle, self.seed = split_seed, shuffle, seed

    def setup(self, stage: str) -> None:
        x, y = all_images()
        rest, test = stratified(range(len(y)), y, self.test_fraction, self.split_seed)
        train, val = stratified(rest, y, self.val_fraction / (1 - self.test_fraction), self.split_seed)
        corrupted = x
        if self.corruption is not None:
            corrupted = corruptions.corrupt(x, self.corruption, self.severity, seed=self.split_seed)
        self.test = TensorDataset(corrupted[test], y[test])
        if self.corrupt_train:
            x = corrupted
        self.val = TensorDataset(x[val], y[val])
        images = with_outliers(x[train], self.outliers, self.outlier_scale, seed=self.seed)
        labels = relabelled(y[train], self.label_noise, num_classes=10, seed=self.seed)
        self.train = TensorDataset(images, labels)
        if self.shards is not None and self.num_shards is not None:
            self.train, self.parts = train_shards(self.shards, self.num_shards, self.train)
            self.val, self.test = (evaluation_shards(self.shards, self.num_shards, d) for d in (self.val, self.test))
        self.class_counts = torch.bincount(self.train.tensors[1], minlength=10).tolist()
        if stage == "fit" and self.mix is not None:
            check_soft_targets(self)

    def train_dataloader(self) -> DataLoader[Any]:
        if self.mix is not None:
            self.mix.num_classes = mixing.outputs(self, 10)
        images, labels = self.train.tensors
        dataset: Any = self.train
        if self.augment is not None:  # the images are in [0, 1] already and are not normalized
            dataset = ImageSet(images.__getitem__, labels.tolist(), _same, self.augment)
        return train_loader(
            dataset,
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            remainder=self.remainder,
            shards=self.parts,
            balance=labels.tolist() if self.balance else None,
            mix=self.mix,
            **self.options,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._exact_loader(self.val)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._exact_loader(self.test)

    def _exact_loader(self, dataset: TensorDataset) -> DataLoader[Any]:
        collate = default_collate if self.shards is None else collate_shards
        return exact_loader(dataset, self.batch_size, collate_fn=collate, **self.options)


def _same(image: Tensor) -> Tensor:
    return image


@cache
def all_images() -> tuple[Tensor, Tensor]:
    """All images and labels; ``setup`` copies what it takes. Lightning calls it for every fit and every test of a run.

    scikit-learn parses a text file, which takes 30 ms.
    """
    pixels, digits = load_digits(return_X_y=True)
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.as_tensor(digits).long()


def stratified(indices: Sequence[int], labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split ``indices`` into two parts; the second has the share ``fraction`` of every class."""
    large, small = train_test_split(
        list(indices), test_size=fraction, random_state=seed, stratify=labels[list(indices)]
    )
    return large, small
