"""A small segmentation network in the manner of DeepLab, with a branch that pools the whole image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeepLab(nn.Module):
    """A stem, dilated blocks, an image-pooling branch and a head, after DeepLabv3 (Chen et al. 2017).

    The parts are named by what their batch norm layers see. ``stem`` and ``blocks`` have image positions, which supply
    values to the statistics. ``pooling`` averages each image to one position, so an image supplies one value to each
    channel: it is the branch in which batch norm with one image per device raises torch's "Expected more than 1 value
    per channel when training". ``norm.only=["*pooling*"]`` selects it.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        num_classes: number of classes, background included.
        width: channels of the stem; the blocks and branches have twice as many.
        dilations: one block for each, at half the resolution.

    Shape:
        Input ``(N, in_channels, H, W)`` with even ``H`` and ``W``, output ``(N, num_classes, H, W)``.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 11, width: int = 16, dilations: Sequence[int] = (2, 4)
    ) -> None:
        super().__init__()
        wide = 2 * width
        self.stem = nn.Sequential(*_conv(in_channels, width, 3), *_conv(width, wide, 3, stride=2))
        self.blocks = nn.Sequential(*(layer for d in dilations for layer in _conv(wide, wide, 3, dilation=d)))
        self.local = nn.Sequential(*_conv(wide, wide, 1))
        self.pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_conv(wide, wide, 1))
        self.head = nn.Sequential(*_conv(2 * wide, wide, 3), nn.Conv2d(wide, num_classes, 1))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(self.stem(x))
        local = self.local(features)
        image = self.pooling(features).expand_as(local)
        scores = self.head(torch.cat([local, image], dim=1))
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=False)


def _conv(inputs: int, outputs: int, size: int, *, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    """Convolution, batch norm and ReLU."""
    padding = dilation * (size // 2)
    conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=padding, dilation=dilation, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
