"""Activations that are computed again change nothing: not the gradients, and not the running statistics."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.nn import simulation
from syncbn.training.models.networks import ResNet
from syncbn.training.network.checkpoint_activations import checkpoint
from tests.support.ranks import Ranks
from tests.support.refuses import refuses

GLOBS = ["*stages.?", "stem*"]
NORMS = ["sync", "local", "simulated"]
State = dict[str, Tensor]


class Counts(nn.Module):
    """Passes its input on, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.weight = 0, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


def network(norm: str) -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(width=4)
    net.stages[1].shortcut.append(nn.Dropout(0.5) if norm != "simulated" else nn.Identity())
    if norm == "sync":
        syncbn.convert(net)
    if norm == "simulated":
        simulation.simulate(net, 2, sharing=2)
    return net


def trained(rank: int, world_size: int, norm: str, globs: list[str]) -> State:
    net = network(norm)
    if globs:
        checkpoint(net, globs)
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    for _ in range(3):
        ddp(torch.randn(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


@pytest.mark.parametrize("norm", NORMS)
def test_weights_and_statistics_are_bitwise_those_without(ranks: Ranks, norm: str) -> None:
    with_globs, without = (ranks.run(trained, norm, globs, world_size=2) for globs in (GLOBS, []))
    for one, other in zip(with_globs, without, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_activations_are_computed_again_in_training_alone() -> None:
    net = nn.Sequential(nn.Sequential(Counts(), nn.Linear(3, 3)), nn.Linear(3, 1))
    checkpoint(net, ["0"])
    net(torch.randn(2, 3)).sum().backward()
    assert net[0][0].calls == 2
    net.eval()(torch.randn(2, 3)).sum().backward()
    assert net[0][0].calls == 3


def test_a_part_within_a_part_is_computed_again_once() -> None:
    net = nn.Sequential(nn.Sequential(nn.Sequential(Counts()), nn.Linear(3, 3)))
    checkpoint(net, ["*"])
    net(torch.randn(2, 3)).sum().backward()
    assert net[0][0][0].calls == 2


def test_a_copy_computes_its_own_parts() -> None:
    net = nn.Sequential(nn.Sequential(Counts()))
    checkpoint(net, ["0"])
    copy = deepcopy(net)
    copy(torch.randn(2)).sum().backward()
    assert (net[0][0].calls, copy[0][0].calls) == (0, 2)
    assert net[0][0].weight.grad is None


def test_names_that_match_nothing_are_refused() -> None:
    with refuses("checkpoint_activations", "*stage.0", "the nearest are", "stages.0"):
        checkpoint(ResNet(), ["*stage.0"])
    with refuses("checkpoint_activations", "*bn1"):
        checkpoint(ResNet(), ["*bn1"])
