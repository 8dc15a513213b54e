"""Implements the setting ``channels_last``: weights and images in channels-last memory format. Imports no Lightning."""

from typing import Any

import torch
from torch import nn

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


def networks(module: nn.Module) -> dict[str, nn.Module]:
    """The networks of a LightningModule by their names: its ``network``, otherwise all its parts with parameters."""
    own = getattr(module, "network", None)
    if isinstance(own, nn.Module):
        return {"network": own}
    return {name: part for name, part in module.named_children() if any(True for _ in part.parameters())}


def use_channels_last(module: nn.Module) -> None:
    """Store the convolution weights of a LightningModule's networks channels-last, and pass their images on so."""
    for network in networks(module).values():
        store_channels_last(network)


def store_channels_last(network: nn.Module) -> None:
    """Store a network's convolution weights channels-last, and pass its images on in this format."""
    for each in (*network.parameters(), *network.buffers()):
        if each.dim() in FORMATS:
            # Not contiguous(): it leaves the strides of a 1x1 convolution, which its gradient then does not have.
            each.data = torch.empty_like(each.data, memory_format=FORMATS[each.dim()]).copy_(each.data)
    network.register_forward_pre_hook(_inputs_channels_last)


def _inputs_channels_last(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_channels_last(each) if isinstance(each, torch.Tensor) else each for each in inputs)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of two or three spatial dimensions in channels-last memory format; any other unchanged."""
    return tensor.contiguous(memory_format=FORMATS[tensor.dim()]) if tensor.dim() in FORMATS else tensor
