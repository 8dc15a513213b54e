"""How an image becomes the input of a trained network, as in the test of its run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncbn.training.data.images.decode import as_tensor, converted, fitted, open_image
from syncbn.training.data.images.headers import pillow
from syncbn.training.data.images.statistics import IMAGENET
from syncbn.training.data.transforms.augmentation import normalized

# The data sets of syncbn by the names that config.yaml may have, without the part that all share.
HOME = "syncbn.training."
DIGITS = {f"{HOME}{name}" for name in ("Digits", "data.Digits", "data.digits.Digits")}
FOLDERS = {f"{HOME}{name}" for name in ("ImageFolder", "data.ImageFolder", "data.image_folder.ImageFolder")}
CIFARS = {f"{HOME}{name}" for name in ("CIFAR", "data.CIFAR", "data.image_archives.CIFAR")}
MNISTS = {f"{HOME}{name}" for name in ("MNIST", "data.MNIST", "data.image_archives.MNIST")}
IMAGENETS = {f"{HOME}{name}" for name in ("ImageNet", "data.ImageNet", "data.imagenet.ImageNet")}
LARGEST = 65536  # pixels of a side
# Parts of a checkpoint that Lightning 2.6.6 writes itself. A buffer or an argument of a module may be called mean too.
NOT_DATA = {"state_dict", "hyper_parameters", "datamodule_hyper_parameters", "loops", "callbacks", "MixedPrecision"}


@dataclass(frozen=True)
class Preprocessing:
    """Makes the input of a network of an image: decoding, scaling, center crop, normalization.

    Call it with the path of an image file or a Pillow image. It returns float32 of shape ``(channels, height, width)``.

    Attributes:
        channels: 1 grey, 3 colour.
        size: height and width of the input.
        mean, std: per channel, of pixels in [0, 1].
        crop_pct: an image of another size is scaled (bicubic) to ``size / crop_pct``, then its center is cropped.
        resize: if given, its shorter side is scaled to this instead (bilinear), as torchvision does.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    resize: int | None = None

    def __call__(self, image: Any) -> Tensor:
        """Raises:
        OSError: the file cannot be read, or is no image.
        """
        is_file = isinstance(image, str | Path)
        opened = open_image(image, self.channels) if is_file else converted(image, self.channels)
        pixels = as_tensor(self._fitted(opened))
        mean, std = (torch.tensor(each, dtype=torch.float32)[:, None, None] for each in (self.mean, self.std))
        return normalized(pixels, mean, std)

    def _fitted(self, image: Any) -> Any:
        if self.resize is None:
            return fitted(image, self.size, self.crop_pct)
        image_module, _ = pillow()
        # The rounding is that of torchvision's Resize and CenterCrop (0.28).
        short = min(image.width, image.height)
        width, height = (
            self.resize if each == short else int(self.resize * each / short) for each in (image.width, image.height)
        )
        image = image.resize((width, height), image_module.Resampling.BILINEAR)
        left, top = round((width - self.size[1]) / 2), round((height - self.size[0]) / 2)
        return image.crop((left, top, left + self.size[1], top + self.size[0]))


def class_names(checkpoint: Mapping[str, Any], data: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes: those that the data module has saved; None if it has saved none."""
    names = _saved(checkpoint).get("classes")
    if isinstance(names, list) and names and all(isinstance(each, str) for each in names):
        return list(names)
    return [str(digit) for digit in range(10)] if data.get("_target_") in DIGITS else None


def preprocessing(checkpoint: Mapping[str, Any], data: Mapping[str, Any]) -> Preprocessing | None:
    """How the run's test made inputs of images; None for a data module that does not say it.

    Args:
        checkpoint: the whole checkpoint.
        data: the settings ``data`` of its run.
    """
    target = data.get("_target_")
    if target in DIGITS:
        return Preprocessing(1, (8, 8), (0.0,), (1.0,))
    if target in IMAGENETS:
        size, resize = _number(data.get("size")) or 224, _number(data.get("resize")) or 256
        return Preprocessing(3, (size, size), IMAGENET[0], IMAGENET[1], resize=resize)
    saved = _saved(checkpoint)
    mean, std = _numbers(saved.get("mean")), _numbers(saved.get("std"))
    default = (32, 32) if target in CIFARS else (28, 28) if target in MNISTS else None  # of checkpoints of version 0.1
    size_saved = saved.get("size")
    pair = tuple(_number(each) for each in size_saved) if isinstance(size_saved, list | tuple) else default
    if mean is None or std is None or len(mean) != len(std) or len(mean) not in (1, 3):
        return None
    if pair is None or len(pair) != 2 or None in pair:
        return None
    crop = saved.get("crop_pct")
    crop_pct = float(crop) if isinstance(crop, int | float) and 0 < crop <= 1 else 1.0
    return Preprocessing(len(mean), (pair[0] or 0, pair[1] or 0), mean, std, crop_pct)


def _saved(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of the data module: Lightning keeps it under the name of its class."""
    states = (each for key, each in checkpoint.items() if isinstance(each, Mapping) and key not in NOT_DATA)
    return next((each for each in states if "classes" in each or {"mean", "std"} <= each.keys()), {})


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST else None


def _numbers(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, Sequence) or not all(isinstance(each, int | float) for each in values):
        return None
    return tuple(map(float, values))
