"""A network for contrastive learning: an encoder, whose features are used later, and a projection head for the loss."""

import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.training.errors import SettingError


class ContrastiveNetwork(nn.Module):
    """A network whose last linear layer is replaced by a projection head (Chen et al. 2020, section 4.2).

    Args:
        network: any network for classification; its last linear layer is removed, the rest is the encoder.
        dim: length of an embedding.

    Attributes:
        encoder: maps ``(N, *)`` to features of shape ``(N, F)``, F the inputs of the removed layer.
        projection: linear, batch norm, ReLU, linear; maps features to ``(N, dim)``. It is dropped after training.

    Shape:
        Output ``(N, dim)``, embeddings of length 1.

    Raises:
        SettingError: the network has no linear layer.
    """

    def __init__(self, network: nn.Module, dim: int = 64) -> None:
        super().__init__()
        width = _remove_last_linear(network)
        self.encoder = network
        self.projection = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.projection(self.encoder(x)), dim=1)


def _remove_last_linear(network: nn.Module) -> int:
    """Replace the linear layer that is registered last by an identity, in place; returns its number of inputs."""
    layers = [(name, layer) for name, layer in network.named_modules() if name and isinstance(layer, nn.Linear)]
    if not layers:
        hint = f"{type(network).__name__} has no linear layer, which a projection head would replace; use mlp or resnet"
        raise SettingError("model", hint=hint)
    name, last = layers[-1]
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return last.in_features
