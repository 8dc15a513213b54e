"""A training step of timm's and torchvision's models: synchronized, it is that of one process with the whole batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import syncbn
from syncbn.testing import force_exchange
from tests.extras.support import zoo
from tests.extras.support.zoo import Entry
from tests.support.ranks import Ranks

# The quick ones, with timm's BatchNormAct2d, and with batch norm over tokens, images and videos.
FAMILIES = [
    "byobnet", "cspnet", "densenet", "dla", "efficientnet", "fasternet", "ghostnet", "levit", "maxxvit", "mobilenetv3",
    "mobilevit", "regnet", "resnet", "resnetv2", "starnet", "vovnet", "xcit",
]  # fmt: skip
NAMES = [
    "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_y_400mf", "lraspp_mobilenet_v3_large", "mc3_18",
]  # fmt: skip
STEPS = [zoo.TIMM[family] for family in FAMILIES] + [entry for entry in zoo.TORCHVISION if entry.name in NAMES]
HALVES = [
    *(zoo.TIMM[family] for family in ("resnet", "efficientnet")),
    *(entry for entry in zoo.TORCHVISION if entry.name in ("shufflenet_v2_x0_5", "regnet_y_400mf")),
]
SIZE = 4

Results = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def build(entry: Entry) -> nn.Module:
    model = zoo.build(entry).double().train()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def step(model: nn.Module, x: Tensor) -> Results:
    """Loss, gradients and buffers. Means over the batch, so that halves of it add up to the whole."""
    loss = sum(output.square().mean() for output in tree_leaves(model(x)))
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), gradients, dict(model.named_buffers())


def assert_equal(actual: Results, expected: Results) -> None:
    """To 1e-8 of the largest: what is zero in theory, as a bias before a batch norm has it, is rounding in both."""
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-8, atol=0)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-8, atol=1e-8)
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-8 * largest)


def with_ours_and_without(rank: int, world_size: int, entry: Entry) -> None:
    x = zoo.batch(entry, SIZE, torch.float64)
    expected = step(build(entry), x)
    with force_exchange():
        assert_equal(step(syncbn.convert(build(entry)), x), expected)


@pytest.mark.parametrize("entry", STEPS, ids=str)
def test_a_step_with_our_layers_is_the_step_without(ranks: Ranks, entry: Entry) -> None:
    ranks.run(with_ours_and_without, entry, world_size=1)


def half(rank: int, world_size: int, entry: Entry) -> Results:
    return step(syncbn.convert(build(entry)), zoo.batch(entry, SIZE, torch.float64).chunk(world_size)[rank])


@pytest.mark.parametrize("entry", HALVES, ids=str)
def test_two_halves_of_a_batch_are_the_whole(ranks: Ranks, entry: Entry) -> None:
    losses, gradients, buffers = zip(*ranks.run(half, entry, world_size=2), strict=True)
    mean: dict[str, Any] = {name: (first + gradients[1][name]) / 2 for name, first in gradients[0].items()}
    assert_equal((sum(losses) / 2, mean, buffers[0]), step(build(entry), zoo.batch(entry, SIZE, torch.float64)))
    assert all(torch.equal(first, buffers[1][name]) for name, first in buffers[0].items())
