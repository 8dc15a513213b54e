"""Mosaics of CIFAR's photographs, for segmentation: which class does each pixel's quadrant show?"""

from typing import Any

import torch
from torch import Tensor

from syncbn.training.data.image_archives import CIFAR
from syncbn.training.data.image_data import ImageSet


class MosaicSet(ImageSet):
    """Pairs of a mosaic of 2x2 images, ``(C, 2 H, 2 W)``, and the mask of their labels, int64 of shape ``(2 H, 2 W)``.

    Each image is in one mosaic, in a random quadrant. The other three are drawn from all images of the part. The draws
    come from torch's global generator, which :class:`~syncbn.training.data.batches.Batches` seeds for each sample.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # a mask in place of a label
        drawn = [index, *torch.randint(len(self), (3,)).tolist()]
        order = torch.randperm(4).tolist()
        read = super().__getitem__
        images, labels = zip(*(read(drawn[place]) for place in order), strict=True)
        photographs = torch.stack(images)
        masks = torch.tensor(labels)[:, None, None].expand(4, *photographs.shape[-2:])
        return _joined(photographs), _joined(masks)


class CIFARMosaics(CIFAR):
    """Mosaics of 2x2 photographs of CIFAR-10 or CIFAR-100, 64x64, for segmentation.

    A batch is ``(images, masks)``: float32 of shape ``(N, 3, 64, 64)`` and int64 of shape ``(N, 64, 64)``. The label of
    a pixel is the class of its quadrant's photograph; there is no background. An epoch has as many mosaics as there are
    photographs. In training they are drawn anew by ``seed``, the epoch and the sample. Those of validation and test
    are fixed. Augmentation is of the photographs, one by one.

    Args:
        root, batch_size, name, settings: those of :class:`CIFAR`.
    """

    def image_set(self, part: str) -> MosaicSet:
        photographs = super().image_set(part)
        return MosaicSet(photographs.read, photographs.labels, photographs.normalize, photographs.augment)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | ({"size": [2 * side for side in state["size"]]} if "size" in state else {})


def _joined(quadrants: Tensor) -> Tensor:
    """Four of shape ``(4, ..., H, W)`` as one: top left, top right, bottom left, bottom right."""
    rows = [torch.cat([*quadrants[first : first + 2]], dim=-1) for first in (0, 2)]
    return torch.cat(rows, dim=-2)
