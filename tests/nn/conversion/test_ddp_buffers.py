"""Plain DistributedDataParallel: no buffer is broadcast in a step, and none needs to be."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.nn.comm import groups
from tests.nn.support.oracle import CHANNELS, close
from tests.support.ranks import Messages, Ranks, messages


class Other(nn.Module):
    """A buffer that is nobody's running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Counting(nn.BatchNorm2d):
    """A batch norm with a buffer of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("mine", torch.zeros(1))


def a_net(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Conv2d(CHANNELS, 4, 1), nn.Sequential(nn.BatchNorm2d(4)), *more)
    return net.double()


def images(count: int) -> Tensor:
    return torch.randn(count, CHANNELS, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def buffers(net: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in net.buffers()]


def loaded_on_rank_0(
    rank: int, world_size: int, group: object, more: list[nn.Module]
) -> tuple[list[Tensor], list[Tensor], Messages, list[Messages]]:
    """The buffers before and after, what was sent for it, and what a step of training sends, forward and backward."""
    net = syncbn.convert(a_net(*more), group=group)
    groups.resolve(net[0].group)  # so that what is counted below is not the building of the group
    if rank == 0:
        for number, buffer in enumerate(net.buffers()):
            buffer.copy_(2**53 - 1 - number if buffer.dtype == torch.int64 else buffer + 0.1 * (number + 1))
    before = buffers(net)
    with messages() as start:
        assert syncbn.broadcast_buffers_once(net) is net
    after = buffers(net)
    wrapped = DistributedDataParallel(net)
    with messages() as forward:
        y = wrapped(images(2))
    with messages() as backward:
        y.square().sum().backward()
    return before, after, start, [forward, backward]


@pytest.mark.parametrize("group", ["world", "node", 2], ids=str)
def test_statistics_are_made_equal_once_and_never_broadcast(ranks: Ranks, group: object) -> None:
    (first, *_), _ = results = ranks.run(loaded_on_rank_0, group, [], world_size=2)
    for before, after, start, (forward, backward) in results:
        assert all(map(torch.equal, after, first))
        assert set(start.operations) == {"broadcast"}
        assert len(start) == 2  # sizes, then values: as many whatever the number of layers
        assert forward.operations == ["allreduce"] * 2
        # One layer's, and DistributedDataParallel's own: the input of the first layer needs no gradient.
        assert backward.operations == ["allreduce"] * 2
        assert before is not after
    assert not torch.equal(results[1][0][0], first[0])  # they did differ


@pytest.mark.parametrize(
    ("group", "more", "broadcasts"),
    [("world", [], 0), (1, [], 2), ("world", [Other()], 1), ("world", [syncbn.convert(Counting(4).double())], 1)],
    ids=["shared", "group of one", "another buffer", "a subclass's buffer"],
)
def test_what_ranks_do_not_share_is_broadcast_as_before(
    ranks: Ranks, group: object, more: list[nn.Module], broadcasts: int
) -> None:
    for *_, (forward, _) in ranks.run(loaded_on_rank_0, group, more, world_size=2):
        assert sum("broadcast" in name for name in forward.operations) == broadcasts  # one for each type of buffers


def test_what_the_user_left_out_stays_out() -> None:
    net = syncbn.convert(a_net(Other()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["3.scale"])
    assert syncbn.broadcast_buffers_once(net) is net  # without a process group
    assert net._ddp_params_and_buffers_to_ignore == ["3.scale"]


def left_out(rank: int, world_size: int) -> list[str]:
    net = syncbn.convert(a_net(Other()), only="0")
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["3.scale"])
    syncbn.broadcast_buffers_once(net)
    return net._ddp_params_and_buffers_to_ignore


def test_what_the_user_left_out_and_ours_are_left_out_together(ranks: Ranks) -> None:
    expected = ["3.scale", "0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert ranks.run(left_out, world_size=2) == [expected] * 2


def two_forwards(rank: int, world_size: int, net: nn.Module, accumulate: str) -> dict[str, Tensor]:
    wrapped = DistributedDataParallel(syncbn.broadcast_buffers_once(net))
    first, second = (x.split([2, 4])[rank] for x in images(12).split(6))
    if accumulate == "one backward":
        (wrapped(first).square().sum() + wrapped(second).cos().sum()).backward()
    else:
        with wrapped.no_sync():
            wrapped(first).square().sum().backward()
        wrapped(second).cos().sum().backward()
    return {name: p.grad * world_size for name, p in net.named_parameters()} | dict(net.named_buffers())


@pytest.mark.parametrize("accumulate", ["one backward", "no_sync"])
def test_two_forwards_for_one_update_equal_one_process(ranks: Ranks, accumulate: str) -> None:
    net = a_net()
    one = deepcopy(net)
    first, second = images(12).split(6)
    (one(first).square().sum() + one(second).cos().sum()).backward()
    expected = {name: p.grad for name, p in one.named_parameters()} | dict(one.named_buffers())
    for mine in ranks.run(two_forwards, syncbn.convert(net), accumulate, world_size=2):
        for name in expected:
            close(mine[name], expected[name], 1e-10, name)
