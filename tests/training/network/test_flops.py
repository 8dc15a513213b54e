"""The operations of a network are counted by their formulas, and counting leaves no trace in it."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.training.models.networks import ResNet
from syncbn.training.network import checkpoint_activations
from syncbn.training.network.flops import Flops, forward_flops, training_flops


class Small(nn.Module):
    """A convolution of 3 to 4 channels, 3 x 3, on 8 x 8 pixels, and a layer of 256 to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(1), random.random(), np.random.rand()
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


CONV, HEAD = 2 * 64 * 4 * 3 * 9, 2 * 256 * 5


def test_the_numbers_are_those_of_the_formulas() -> None:
    images = torch.rand(6, 3, 8, 8)
    assert forward_flops(Small(), images) == CONV + HEAD
    # Backward: the weights' gradients of both, and the input's of the second alone.
    assert training_flops(Small(), images) == Flops(CONV + HEAD, CONV + 2 * HEAD)


def test_a_frozen_part_has_no_gradients_of_its_weights() -> None:
    network = Small()
    network.conv.requires_grad_(False)
    network.norm.requires_grad_(False)
    assert training_flops(network, torch.rand(1, 3, 8, 8)) == Flops(CONV + HEAD, HEAD)


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("count", [forward_flops, training_flops])
def test_counting_leaves_no_trace(count: Any) -> None:
    network = syncbn.convert(Small())
    network.norm.eval()  # as FreezeNorm leaves it
    before, modes = state(network), [each.training for each in network.modules()]
    draws = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert count(network, images) is not None
    assert all(torch.equal(value, before[name]) for name, value in state(network).items())
    assert [each.training for each in network.modules()] == modes
    assert all(each.grad is None for each in network.parameters())
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert random.getstate() == draws[1]
    assert np.random.get_state()[1].tolist() == draws[2]


def test_a_network_that_takes_no_such_input_has_no_number() -> None:
    network = Small()
    assert forward_flops(network, torch.rand(2, 7)) is None
    assert training_flops(network, "text") is None
    assert network.training


def test_attention_is_counted() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    tokens = torch.rand(2, 5, 16)
    products = 5 * 16 * (3 * 16 + 16 + 32 + 32) + 2 * 5 * 5 * 16  # projections, feed-forward; scores and their sums
    assert forward_flops(layer.eval(), tokens) == 2 * products


def test_recomputed_activations_count_once() -> None:
    images = torch.rand(2, 1, 8, 8)
    network = ResNet()
    plain = training_flops(network, images)
    checkpoint_activations.checkpoint(network, ["*"])
    assert plain is not None
    assert training_flops(network, images) == plain


def test_other_types_of_weights() -> None:
    images = torch.rand(2, 1, 8, 8)
    plain = forward_flops(ResNet(), images)
    assert plain is not None
    assert forward_flops(ResNet().double(), images) == plain
    assert forward_flops(ResNet().to(torch.bfloat16), images) == plain
