"""The LightningDataModule of ImageNet, or of other images in one folder per class. Requires torchvision."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from syncbn.training.data.image_data import check_soft_targets
from syncbn.training.data.loaders import exact_loader, loader_options, train_loader
from syncbn.training.data.samplers import check_remainder
from syncbn.training.data.transforms import augmentation, mixing
from syncbn.training.data.transforms.augmentation import Augmentation
from syncbn.training.data.transforms.mixing import Mix
from syncbn.training.errors import SettingError
from syncbn.training.vision_packages import install_command

# Per channel of ImageNet's training images with values in [0, 1], from torchvision's documentation.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNet(pl.LightningDataModule):
    """Images of shape ``(3, size, size)``, normalized by channel, from ``ROOT/train/CLASS/`` and ``ROOT/val/CLASS/``.

    In training, a random crop of 8 to 100 % of the image's area is scaled to ``size`` and mirrored with probability 0.5
    (Szegedy et al. 2015). Validation and test both use the images of ``val``, scaled to a shorter side of ``resize``
    and center-cropped to ``size``. The labels of ImageNet's test images are not public, and papers report the error on
    the validation images.

    Args:
        root: directory with the folders ``train`` and ``val``.
        batch_size: samples per device and step.
        num_classes: number of classes of the network; must equal the number of class folders.
        size: side of the network's input in pixels.
        resize: shorter side of an image in pixels, before the center crop.
        shuffle: whether each training epoch has a new order.
        seed: seed of the training order and of the crops.
        num_workers: loader processes per device.
        remainder: treatment of the training images after the last full global batch (see
            :func:`~syncbn.training.data.loaders.train_loader`).
        augment: the settings of ``conf/augment``, in place of the crop and the flip; None for these.
        mix: the settings of ``conf/mix``; None for none.
        balance: whether each epoch draws equally many images of each class.
        in_channels: number of channels, 3; nothing else is accepted.
        loader: further arguments of :func:`~syncbn.training.data.loaders.loader_options`.

    Raises:
        SettingError: a missing directory; torchvision is not installed; unknown ``remainder``; in ``setup``, folders
            without images, or a number of folders other than ``num_classes``.
    """

    def __init__(
        self,
        root: str | None,
        batch_size: int = 32,
        *,
        num_classes: int = 1000,
        size: int = 224,
        resize: int = 256,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        remainder: str = "drop",
        augment: dict[str, Any] | None = None,
        mix: dict[str, Any] | None = None,
        balance: bool = False,
        in_channels: int = 3,
        **loader: Any,
    ) -> None:
        super().__init__()
        check_remainder(remainder)
        if not 1 <= size <= resize:
            raise SettingError("data.size", size, f"use 1 or more, and at most data.resize={resize}")
        self.folders, self._listed = _folders(root), False
        _torchvision()
        self.root, self.num_classes, self.size, self.resize = root, num_classes, size, resize
        self.batch_size, self.shuffle, self.seed, self.remainder = batch_size, shuffle, seed, remainder
        if in_channels != 3:
            raise SettingError("data.in_channels", in_channels, "the images are converted to colour; leave it out")
        self.options = loader_options(num_workers, **loader)
        self.augment = None if augment is None else Augmentation(augmentation.check(augment), (size, size))
        self.mix = None if mix is None else Mix(mixing.check(mix), num_classes)
        mixing.check_batch(mix, batch_size)
        self.balance, self.class_counts = bool(balance), list[int]()

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.mix is not None:
            check_soft_targets(self)
        if self._listed:  # a second stage uses the same images, and listing 1.3 million files takes long
            return
        v2 = _torchvision().transforms.v2
        as_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        before: list[Any] = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip()]
        after: list[Any] = []
        if self.augment is not None:
            before = [] if self.augment.crops else [v2.Resize(self.resize), v2.CenterCrop(self.size)]
            before += [] if self.augment.before is None else [self.augment.before]
            after = [] if self.augment.after is None else [self.augment.after]
        self.train = self._images("train", *before, *as_tensor, *after)
        self.class_counts = torch.bincount(torch.tensor(self.train.targets), minlength=self.num_classes).tolist()
        self.val = self._images("val", v2.Resize(self.resize), v2.CenterCrop(self.size), *as_tensor)
        differ = sorted(set(self.train.classes) ^ set(self.val.classes))
        if differ:
            raise SettingError(
                "data.root",
                self.root,
                f"train and val must have folders of the same names; {differ[0]} is in one of them only",
            )
        self._listed = True

    def state_dict(self) -> dict[str, Any]:
        """The names of the classes, for :func:`syncbn.load`."""
        return {"classes": list(self.val.classes)} if self._listed else {}

    def train_dataloader(self) -> DataLoader[Any]:
        if self.mix is not None:
            self.mix.num_classes = mixing.outputs(self, self.num_classes)
        return train_loader(
            self.train,
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            remainder=self.remainder,
            balance=self.train.targets if self.balance else None,
            mix=self.mix,
            **self.options,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return exact_loader(self.val, self.batch_size, **self.options)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def _images(self, part: str, *transforms: Any) -> Any:
        torchvision = _torchvision()
        try:
            images = torchvision.datasets.ImageFolder(
                self.folders[part], torchvision.transforms.v2.Compose(list(transforms))
            )
        except FileNotFoundError as error:  # no folder, or one without images
            raise SettingError("data.root", self.root, " ".join(str(error).split())) from error
        if len(images.classes) != self.num_classes:
            raise SettingError(
                "data.num_classes",
                self.num_classes,
                f"{self.folders[part]} has {len(images.classes)} folders, one a class; use "
                f"data.num_classes={len(images.classes)}",
            )
        return images


def _folders(root: str | None) -> dict[str, Path]:
    expects = "ImageNet is expected as train/CLASS/*.JPEG and val/CLASS/*.JPEG below data.root"
    if root is None:
        raise SettingError("data.root", None, f"{expects}; set it, or the environment variable IMAGENET")
    folders = {part: Path(root, part) for part in ("train", "val")}
    for folder in folders.values():
        if not folder.is_dir():
            raise SettingError("data.root", root, f"there is no directory {folder}; {expects}")
    return folders


def _torchvision() -> Any:
    """Import torchvision on first use, since it is an optional dependency (the extra ``vision``)."""
    try:
        import torchvision
        import torchvision.transforms.v2  # noqa: F401  # torchvision alone does not import it
    except ModuleNotFoundError as error:
        raise SettingError(
            "data",
            "imagenet",
            f"torchvision reads its images and is not installed; {install_command()}",
        ) from error
    return torchvision
