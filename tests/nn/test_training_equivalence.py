"""A training run of two ranks at batch b follows the one-process run at 2b."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.support.ranks import Ranks

STEPS, PER_RANK = 20, 4
State = dict[str, Tensor]


def a_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5, bias=False),
        nn.BatchNorm1d(5, affine=False),
    ).double()


def data(world_size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    size = PER_RANK * world_size
    return [
        (
            torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64) + torch.arange(size).view(-1, 1, 1, 1),
            torch.randint(5, (size,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def train(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for x, target in batches:
        optimizer.zero_grad()
        F.cross_entropy(net(x), target).backward()
        optimizer.step()


def in_eval(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


def on_a_rank(
    rank: int, world_size: int, net: nn.Module, batches: list[tuple[Tensor, Tensor]], options: dict
) -> tuple[State, Tensor]:
    mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    wrapped = DistributedDataParallel(net, **options)
    train(wrapped, [(x[mine], target[mine]) for x, target in batches])
    return net.state_dict(), in_eval(net, batches[0][0])


def distance(state: State, other: State) -> float:
    assert state.keys() == other.keys()
    return max((state[name] - other[name]).abs().max().item() for name in state)


@pytest.fixture(scope="module")
def one_process() -> tuple[State, Tensor]:
    net, batches = a_net(), data(2)
    train(net, batches)
    return deepcopy(net.state_dict()), in_eval(net, batches[0][0])


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")  # its successor is torch 2.13's
@pytest.mark.parametrize(
    ("group", "options"),
    [
        ("world", {}),
        ("node", {}),
        (2, {}),
        ("world", {"broadcast_buffers": False}),
        ("world", {"static_graph": True}),
        ("world", {"gradient_as_bucket_view": True}),
    ],
    ids=lambda value: ",".join(value) or "default" if isinstance(value, dict) else str(value),
)
def test_two_ranks_follow_one_process_at_twice_the_batch(
    ranks: Ranks, one_process: tuple[State, Tensor], group: object, options: dict
) -> None:
    net = syncbn.convert(a_net(), group=group)
    results = ranks.run(on_a_rank, net, data(2), options, world_size=2, fresh=True)
    for state, y in results:
        assert distance(state, one_process[0]) < 1e-10
        torch.testing.assert_close(y, one_process[1], rtol=1e-10, atol=1e-10)
    first, second = (state for state, _ in results)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("per_device", ["torch", "reverted", "group=1"])
def test_per_device_statistics_do_not_follow(ranks: Ranks, one_process: tuple[State, Tensor], per_device: str) -> None:
    # So the test above can fail: without the exchange the same run ends somewhere else.
    net = {
        "torch": a_net,
        "reverted": lambda: syncbn.revert(syncbn.convert(a_net())),
        "group=1": lambda: syncbn.convert(a_net(), group=1),
    }[per_device]()
    for state, y in ranks.run(on_a_rank, net, data(2), {}, world_size=2):
        assert distance(state, one_process[0]) > 1e-2
        assert (y - one_process[1]).abs().max() > 1e-2
