"""Batch norm classes with a forward pass of their own, as third parties have them."""

import torch
from torch import Tensor, nn


class NormAct(nn.BatchNorm2d):
    """Adds to torch's forward pass, as timm's BatchNormAct2d does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Split(nn.BatchNorm2d):
    """Gives half of the batch to a batch norm within, as timm's SplitBatchNorm2d does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.aux = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.aux(second)])
