"""A model travels: into spawned processes, through a file, as a state dict, and trains where it arrives."""

import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.nn.support.oracle import CHANNELS, close
from tests.support.ranks import Ranks

State = dict[str, Tensor]
GROUPS = ["world", "node", 2, (0, 1)]


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))


def images() -> Tensor:
    return torch.randn(6, CHANNELS, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(net: nn.Module, x: Tensor) -> State:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).cos().mean().backward()
        optimizer.step()
    return net.state_dict()


def after_one_process() -> State:
    return train(a_net().double(), images())


def on_a_rank(rank: int, world_size: int, net: nn.Module) -> State:
    train(DistributedDataParallel(net), images().chunk(world_size)[rank])
    return net.state_dict()


def check(states: list[State]) -> None:
    for state in states:
        for name, expected in after_one_process().items():
            close(state[name], expected, 1e-10, name)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_a_model_pickles_into_spawned_processes_and_trains_there(ranks: Ranks, group: object) -> None:
    # The harness's ranks are processes that multiprocessing spawned; what they are sent is pickled.
    check(ranks.run(on_a_rank, syncbn.convert(a_net().double(), group=group), world_size=2, fresh=True))


def with_a_process_group(rank: int, world_size: int) -> nn.Module:
    net = syncbn.convert(a_net().double(), group=dist.new_group([0, 1]))
    net(images()[:2])  # in use
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    return net


def test_a_model_with_a_process_group_trains_in_the_processes_of_another_world(ranks: Ranks) -> None:
    net, _ = ranks.run(with_a_process_group, world_size=2)
    assert net[1].group == (0, 1)
    check(ranks.run(on_a_rank, net, world_size=2, fresh=True))


def from_a_file(rank: int, world_size: int, file: Path, whole: bool) -> State:
    if whole:
        net = torch.load(file, weights_only=False)
    else:
        net = syncbn.convert(a_net().double())
        net.load_state_dict(torch.load(file, weights_only=True))
    return on_a_rank(rank, world_size, net)


@pytest.mark.parametrize("whole", [True, False], ids=["module", "state_dict"])
def test_a_file_loads_on_each_rank(ranks: Ranks, tmp_path: Path, whole: bool) -> None:
    net = syncbn.convert(a_net().double())
    torch.save(net if whole else net.state_dict(), tmp_path / "model.pt")
    check(ranks.run(from_a_file, tmp_path / "model.pt", whole, world_size=2))


@pytest.mark.parametrize("there", [a_net, lambda: syncbn.convert(a_net(), group=2)], ids=["torch", "synchronized"])
def test_a_state_dict_is_weights_alone(there: object) -> None:
    net, file = syncbn.convert(a_net(), group="node", ghost_batch=3), io.BytesIO()
    net(images().float())
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = there()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, other.state_dict().values(), net.state_dict().values()))
