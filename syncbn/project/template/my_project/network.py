"""The network. ``conf/model/network.yaml`` names it and sets its arguments."""

import torch
from torch import nn


class Network(nn.Module):
    """A small convolutional network.

    Batch norm is written as torch's. ``norm=sync`` synchronizes it over all devices, ``norm=local`` does not.

    Args:
        num_classes: number of outputs.
        in_channels: channels of an image.
        width: channels of the first convolution; the second has twice as many.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns a score per image and class; ``images`` is N x C x H x W."""
        return self.head(self.features(images).mean((2, 3)))  # type: ignore[no-any-return]
