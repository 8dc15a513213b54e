"""Augments images of digits of 8x8 pixels into two views, a whole batch at a time."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from syncbn.training.errors import SettingError

DRAWS = 6  # per view: shift in x and y, angle, scale, contrast, brightness
SHIFT, ANGLE, SCALE = 0.25, 0.35, 0.15  # the largest: in half widths of the image (1 pixel of 8), radians, a share
CONTRAST, BRIGHTNESS, NOISE = 0.4, 0.2, 0.1  # a share, and in units of pixels, which are in [0, 1]


class Drawn(Dataset[Any]):
    """A data set of ``(image, label)`` with the random draws for two views: ``(image, uniform, normal, label)``.

    The loaders seed torch's generator for each sample. A batch is then augmented at once, which takes a fraction of the
    time that one image after the other takes.

    Args:
        images: images of shape ``(1, H, W)`` with labels.
    """

    def __init__(self, images: TensorDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image, label = self.images[index]
        # In the images' type: with precision=64-true Lightning changes torch's default, and with it the draws.
        kind = image.dtype
        return image, torch.rand(2, DRAWS, dtype=kind), torch.randn(2, *image.shape, dtype=kind), label


class DigitAugmentation:
    """Makes a batch of two views from samples of :class:`Drawn`: shift, rotation, scale, contrast, brightness, noise.

    Args:
        strength: factor on the largest change of each kind; 0 leaves the images as they are.

    Raises:
        SettingError: a strength below 0.
    """

    def __init__(self, strength: float = 1.0) -> None:
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not strength >= 0:
            raise SettingError("data.strength", strength, "use a number, 0 or more")
        self.strength = strength

    def __call__(self, samples: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the two views, each of shape ``(N, 1, H, W)``, and the labels."""
        images, uniform, normal, labels = default_collate(samples)
        first, second = (self.view(images, uniform[:, view], normal[:, view]) for view in (0, 1))
        return first, second, labels

    def view(self, images: Tensor, uniform: Tensor, normal: Tensor) -> Tensor:
        """One view of each image.

        Args:
            images: shape ``(N, 1, H, W)``.
            uniform: in [0, 1), shape ``(N, DRAWS)``.
            normal: standard normal numbers of the shape of the images.
        """
        x, y, angle, scale, contrast, brightness = ((uniform * 2 - 1) * self.strength).unbind(1)
        cos, sin = torch.cos(ANGLE * angle), torch.sin(ANGLE * angle)
        size = (SCALE * scale).exp()  # as a factor: equally likely to grow and to shrink
        rows = torch.stack([size * cos, -size * sin, SHIFT * x, size * sin, size * cos, SHIFT * y], dim=1)
        grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, align_corners=False)  # bilinear; black outside
        factor, offset = (CONTRAST * contrast).exp(), BRIGHTNESS * brightness
        shape = (-1, 1, 1, 1)
        return moved * factor.view(shape) + offset.view(shape) + NOISE * self.strength * normal
