"""The base of the data modules of images: normalization, augmentation, mixing, loaders, and what a checkpoint keeps."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from syncbn.training.console import print_line
from syncbn.training.data.images.statistics import IMAGENET
from syncbn.training.data.loaders import exact_loader, loader_options, train_loader
from syncbn.training.data.samplers import check_remainder
from syncbn.training.data.transforms import augmentation, mixing
from syncbn.training.data.transforms.augmentation import Augmentation, normalized
from syncbn.training.data.transforms.mixing import Mix
from syncbn.training.errors import AgreedError, SettingError


class ImageSet(Dataset[Any]):
    """Pairs of a normalized image, float32 of shape ``(C, H, W)``, and its label.

    Args:
        read: returns the uint8 image of an index.
        labels: the label of each index.
        normalize: makes a normalized float32 image of a uint8 image.
        augment: augments an image; None for none.
        samples: the file of each index, with its label, for error messages; None for images in memory.
    """

    def __init__(
        self,
        read: Callable[[int], Tensor],
        labels: Sequence[int],
        normalize: Callable[[Tensor], Tensor],
        augment: Augmentation | None = None,
        samples: list[tuple[str, int]] | None = None,
    ) -> None:
        self.read, self.labels, self.normalize, self.augment, self.samples = read, labels, normalize, augment, samples

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.read(index)
        pixels = self.normalize(image) if self.augment is None else self.augment(image, self.normalize)
        return pixels, int(self.labels[index])


class Normalize:
    """Normalizes uint8 images per channel; a class, so that loader processes can be spawned with it."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(each, dtype=torch.float32)[:, None, None] for each in (mean, std))

    def __call__(self, image: Tensor) -> Tensor:
        return normalized(image, self.mean, self.std)


class ImageData(pl.LightningDataModule):
    """Base of the data modules of images. A subclass implements ``load``, ``image_set`` and ``measure``.

    The checkpoint keeps the class names, the mean and the standard deviation. A resumed run, and the test of a
    checkpoint, normalize with these, and refuse data of other classes.

    Args:
        batch_size: samples per device and step.
        num_classes: number of classes; None for those that the data have.
        in_channels: 1 grey, 3 colour; None for those of the data.
        augment: the settings of ``conf/augment``; None for none.
        mix: the settings of ``conf/mix``; None for none.
        mean: mean of the pixels in [0, 1], per channel; "imagenet"; None to measure it over the training images.
        std: standard deviation, in the same way.
        val_fraction: share of the training images for validation, by class.
        split_seed: seed of the split.
        shuffle: whether each training epoch has a new order.
        seed: seed of the training order, of augmentation and of mixing.
        remainder: treatment of the training images after the last full global batch (see
            :func:`~syncbn.training.data.loaders.train_loader`).
        balance: whether each epoch draws equally many images of each class.
        loader: further arguments of :func:`~syncbn.training.data.loaders.loader_options`.

    Attributes:
        classes: names of the classes, after ``setup``.
        class_counts: number of training images of each class, after ``setup``.

    Raises:
        SettingError: a setting that is unknown or out of its range.
    """

    classes: list[str]
    prepare_data_per_node = False

    def __init__(
        self,
        batch_size: int = 32,
        *,
        num_classes: int | None = None,
        in_channels: int | None = None,
        augment: dict[str, Any] | None = None,
        mix: dict[str, Any] | None = None,
        mean: Sequence[float] | str | None = None,
        std: Sequence[float] | str | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        remainder: str = "drop",
        balance: bool = False,
        **loader: Any,
    ) -> None:
        super().__init__()
        check_remainder(remainder)
        self.options = loader_options(**loader)
        self.augment = None if augment is None else augmentation.check(augment)
        self.mix = None if mix is None else mixing.check(mix)
        mixing.check_batch(mix, batch_size)
        self.batch_size, self.shuffle, self.seed, self.remainder = batch_size, shuffle, seed, remainder
        self.num_classes, self.in_channels, self.balance = num_classes, in_channels, bool(balance)
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.mean, self.std = given_statistics(mean, std, in_channels)
        self.class_counts: list[int] = []
        self._ready = False

    def load(self) -> None:
        """Read the images or list them, and set ``classes``; called once."""
        raise NotImplementedError

    def labels(self, part: str) -> Sequence[int]:
        """The labels of a part: "train", "val" or "test"."""
        raise NotImplementedError

    def image_set(self, part: str) -> ImageSet:
        """The images of a part, augmented if it is "train"."""
        raise NotImplementedError

    def measure(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the training images, the same on all ranks."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        if not self._ready:  # a second stage uses the same images
            self.load()
            self._check_facts()
            counts = Counter(map(int, self.labels("train")))
            self.class_counts = [counts[label] for label in range(len(self.classes))]
            self._ready = True
        if stage == "fit" and self.mix is not None:
            check_soft_targets(self)

    def train_dataloader(self) -> DataLoader[Any]:
        self.settle_statistics()
        images = self.image_set("train")
        return train_loader(
            images,
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            remainder=self.remainder,
            balance=self.labels("train") if self.balance else None,
            mix=None if self.mix is None else Mix(self.mix, mixing.outputs(self, len(self.classes))),
            **self.options,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        self.settle_statistics()
        return exact_loader(self.image_set("val"), self.batch_size, **self.options)

    def test_dataloader(self) -> DataLoader[Any]:
        self.settle_statistics()
        return exact_loader(self.image_set("test"), self.batch_size, **self.options)

    def settle_statistics(self) -> None:
        """Measure the mean and the standard deviation, unless they are given or came from a checkpoint."""
        if self.mean is None or self.std is None:
            self.mean, self.std = self.measure()

    def normalize(self) -> Normalize:
        """The normalization of the images."""
        assert self.mean is not None
        assert self.std is not None
        return Normalize(self.mean, self.std)

    def about(self) -> dict[str, Any]:
        """What ``data.json`` in the run directory says of the data."""
        parts = {part: len(self.labels(part)) for part in ("train", "val", "test")}
        counts = dict(zip(self.classes, self.class_counts, strict=True))
        return {"classes": counts, "images": parts, "mean": self.mean, "std": self.std}

    def state_dict(self) -> dict[str, Any]:
        if not self._ready:
            return {}
        return {"classes": list(self.classes), "mean": self.mean, "std": self.std}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take mean and standard deviation of the checkpoint.

        Raises:
            AgreedError: the checkpoint's run had other classes.
        """
        theirs = state_dict.get("classes")
        if theirs is not None and self._ready and theirs != self.classes:
            differ = sorted(set(theirs) ^ set(self.classes)) or ["their order"]
            hint = f"the checkpoint's run had other classes ({differ[0]} differs); use the data of that run"
            raise AgreedError("data", hint=hint)
        self.mean, self.std = state_dict.get("mean"), state_dict.get("std")

    def _check_facts(self) -> None:
        found = len(self.classes)
        if self.num_classes is None:
            self.num_classes = found
        if self.num_classes != found:
            raise SettingError("data.num_classes", self.num_classes, f"the data have {found} classes; leave it out")


def given_statistics(
    mean: Sequence[float] | str | None, std: Sequence[float] | str | None, channels: int | None
) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation as they are set: numbers per channel, "imagenet", or None to measure both.

    Raises:
        SettingError: one of the two is missing, another number of values than channels, a deviation of 0.
    """
    if mean == "imagenet" and std in (None, "imagenet"):
        mean, std = IMAGENET
        if channels == 1:
            raise SettingError("data.mean", "imagenet", "the images are grey; use data.channels=3, or one number")
    if mean is None and std is None:
        return None, None
    found: list[list[float]] = []
    for name, value in (("mean", mean), ("std", std)):
        if value is None or isinstance(value, str):
            raise SettingError(f"data.{name}", value, "use one number per channel for both mean and std, or imagenet")
        values = [float(each) for each in (value if isinstance(value, Sequence) else [value])]
        if channels is not None and len(values) != channels:
            raise SettingError(f"data.{name}", value, f"use {channels} numbers, one per channel of the images")
        found.append(values)
    if min(found[1]) <= 0:
        raise SettingError("data.std", std, "use numbers above 0")
    return found[0], found[1]


def check_soft_targets(data: pl.LightningDataModule) -> None:
    """Refuse mixing for a LightningModule that does not say that its loss takes soft targets.

    Raises:
        AgreedError: ``accepts_soft_targets`` is not True in the class of the module.
    """
    module = None if data.trainer is None else data.trainer.lightning_module
    if module is not None and not getattr(module, "accepts_soft_targets", False):
        hint = f"{type(module).__name__} takes no soft targets, one probability per class; use mix=none, or set "
        raise AgreedError("mix", hint=f"{hint}accepts_soft_targets = True in the class if its loss does")


def report(data: pl.LightningDataModule, line: str) -> None:
    """Print a line on rank 0."""
    if data.trainer is None or data.trainer.is_global_zero:
        print_line(line)
