"""The LightningDataModule for segmentation: scikit-learn's handwritten digits on larger canvases, with clutter."""

import math
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from syncbn.training.data.digits import all_images, stratified
from syncbn.training.data.loaders import exact_loader, loader_options, train_loader
from syncbn.training.data.samplers import check_remainder
from syncbn.training.errors import SettingError

SIZE = 32  # of a canvas, in pixels
DIGITS = 3  # at most, on a canvas
CLUTTER = 2  # halves of digits on each canvas, which are background
INK = 0.35  # a pixel with this much ink of a digit (of 1) belongs to it


class DigitScenes(pl.LightningDataModule):
    """Canvases of 32x32 with 1 to 3 handwritten digits, for segmentation.

    A batch is ``(images, masks)``: float32 of shape ``(N, 1, 32, 32)`` and int64 of shape ``(N, 32, 32)``. Class 0 is
    background, class ``d + 1`` is the digit ``d``. Digits differ in size (11 to 17 pixels), slant and place, and a
    later one covers an earlier one. Halves of other digits are clutter, which is
    background. Contrast and brightness
    differ from image to image, as in photographs, and each pixel has noise.

    The 1,797 digits are split into training, validation and test before they are placed, so evaluation has unseen
    handwriting. The scenes are drawn once, by ``split_seed``: runs with different ``seed`` have the same images.

    Args:
        batch_size: images per device and step.
        images: number of training scenes.
        eval_images: number of scenes of validation, and of the test.
        split_seed: seed of the split and of the scenes.
        shuffle: whether each training epoch has a new order.
        seed: seed of the training order.
        num_workers: loader processes per device.
        remainder: treatment of the images after the last full global batch (see :func:`train_loader`).
        num_classes, in_channels: facts of the data, 11 and 1.

    Raises:
        SettingError: unknown ``remainder``; a number of images below 1; other facts than those of the data.
    """

    classes = ("background", *map(str, range(10)))

    def __init__(
        self,
        batch_size: int = 8,
        *,
        images: int = 1024,
        eval_images: int = 256,
        split_seed: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        remainder: str = "drop",
        num_classes: int = 11,
        in_channels: int = 1,
        **loader: Any,
    ) -> None:
        super().__init__()
        for name, given, fact in (("num_classes", num_classes, 11), ("in_channels", in_channels, 1)):
            if given != fact:
                raise SettingError(f"data.{name}", given, f"the scenes have {fact}; leave it out")
        for name, number in (("images", images), ("eval_images", eval_images)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise SettingError(f"data.{name}", number, "use a whole number, 1 or more")
        check_remainder(remainder)
        self.batch_size, self.remainder = batch_size, remainder
        self.images, self.eval_images, self.split_seed = images, eval_images, split_seed
        self.shuffle, self.seed = shuffle, seed
        self.num_workers = num_workers
        self.options = loader_options(num_workers, **loader)

    def setup(self, stage: str) -> None:
        self.train = TensorDataset(*scenes("train", self.images, self.split_seed))
        self.val, self.test = (
            TensorDataset(*scenes(part, self.eval_images, self.split_seed)) for part in ("val", "test")
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader(
            self.train,
            self.batch_size,
            shuffle=self.shuffle,
            seed=self.seed,
            remainder=self.remainder,
            **self.options,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return exact_loader(self.val, self.batch_size, **self.options)

    def test_dataloader(self) -> DataLoader[Any]:
        return exact_loader(self.test, self.batch_size, **self.options)


@cache
def scenes(part: str, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and masks of a part of the data, "train", "val" or "test"; the same for the same arguments."""
    digits, labels = all_images()
    rest, test = stratified(range(len(labels)), labels, 0.25, seed)
    train, val = stratified(rest, labels, 0.2, seed)
    place, own = {"train": (0, train), "val": (1, val), "test": (2, test)}[part]
    generator = torch.Generator().manual_seed(3 * seed + place)
    own_digits, own_labels = digits[own], labels[own]

    chosen, pieces = (torch.randint(len(own), (number, count), generator=generator) for count in (DIGITS, CLUTTER))
    classes = own_labels[chosen] + 1
    shown = 1 + torch.randint(DIGITS, (number, 1), generator=generator) > torch.arange(DIGITS)
    quadrants = torch.rand(number, 4, generator=generator).argsort(1)[:, :DIGITS]
    centers = torch.stack([quadrants % 2, quadrants // 2], 2) - 0.5  # in -1 to 1, as affine_grid counts
    ink = _placed(own_digits[chosen.flatten()], centers.view(-1, 2), 0.25, generator)
    ink = ink.view(number, DIGITS, SIZE, SIZE) * shown[..., None, None]
    halves = own_digits[pieces.flatten()] * _halves(number * CLUTTER, generator)
    drawn = _placed(halves, torch.zeros(2), 0.75, generator).view(number, CLUTTER, SIZE, SIZE).amax(1)
    masks = torch.zeros(number, SIZE, SIZE, dtype=torch.long)
    for each in range(DIGITS):
        covers = ink[:, each] > INK
        masks = torch.where(covers, classes[:, each, None, None], masks)
        drawn = torch.where(covers, ink[:, each], torch.maximum(drawn, ink[:, each]))
    contrast = 0.5 + 1.0 * torch.rand(number, 1, 1, generator=generator)
    brightness = 0.5 * torch.randn(number, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(number, SIZE, SIZE, generator=generator)
    return (contrast * drawn + brightness + noise).unsqueeze(1), masks


def _placed(digits: Tensor, centers: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    """Each digit of shape ``(N, 1, 8, 8)`` on its canvas, of a random size and slant: ``(N, 32, 32)``.

    ``centers`` are x and y in -1 to 1, of shape ``(N, 2)``. Each is moved by up to ``jitter``.
    """
    number = len(digits)
    draws = torch.rand(number, 4, generator=generator)
    scale, slant = SIZE / (11 + 6 * draws[:, 0]), math.pi / 12 * (2 * draws[:, 1] - 1)
    places = centers + jitter * (2 * draws[:, 2:] - 1)
    cos, sin = torch.cos(slant) * scale, torch.sin(slant) * scale
    to_digit = torch.stack([cos, -sin, sin, cos], 1).view(number, 2, 2)  # from canvas to digit, as affine_grid has it
    theta = torch.cat([to_digit, -to_digit @ places.unsqueeze(2)], 2)
    grid = F.affine_grid(theta, [number, 1, SIZE, SIZE], align_corners=False)
    return F.grid_sample(digits, grid, align_corners=False).squeeze(1)


def _halves(number: int, generator: torch.Generator) -> Tensor:
    """Masks that cut a digit of 8x8 pixels through its middle, at a random angle: ``(N, 1, 8, 8)``."""
    angle = 2 * math.pi * torch.rand(number, 1, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    return (torch.cos(angle) * x + torch.sin(angle) * y > 0).float()
