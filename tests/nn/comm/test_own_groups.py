"""The process groups that the layer makes: by all ranks, with the user's time-out, apart from those of DDP."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.nn.comm import c10d, groups
from tests.support.ranks import Ranks, messages

LAUNCHER = "GROUP_RANK"


@contextmanager
def on_node(name: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LAUNCHER, str(name))
        yield


def another_world(rank: int, size: int, store: Path, seconds: float) -> None:
    """The harness's own process group waits for half an hour."""
    dist.destroy_process_group()
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)


def trained(group: object, rank: int) -> Tensor:
    layer = syncbn.SyncBatchNorm1d(3, group=group)
    layer(torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))).sum().backward()
    return layer.running_mean


def among_the_users_groups(rank: int, world_size: int, group: object) -> list[Tensor]:
    _ = dist.new_group([0, 2])  # ranks are in unequally many groups
    with on_node(rank // 2):
        means = [trained(group, rank)]
        later = dist.new_group([0, 2], use_local_synchronization=True) if rank in (0, 2) else None
        if later is not None:
            dist.barrier(later)
        _ = dist.new_group([1, 2, 3])
        return [*means, trained("world", rank), trained(group, rank)]


@pytest.mark.parametrize("group", [2, "node"])
def test_the_users_groups_are_no_matter(ranks: Ranks, group: object) -> None:
    (first, whole, again), *others = ranks.run(among_the_users_groups, group, world_size=4, timeout=30, fresh=True)
    assert torch.equal(first, again)
    assert all(torch.equal(whole, other[1]) for other in others)
    assert torch.equal(others[0][0], first)
    assert torch.equal(others[1][0], others[2][0])
    assert not torch.equal(others[1][0], first)


def on_uneven_nodes(rank: int, world_size: int) -> None:
    with on_node(min(rank, 1)):
        group = groups.resolve("node")
    assert group is not None
    assert dist.get_process_group_ranks(group) == ([0] if rank == 0 else [1, 2])
    later = dist.new_group([0, rank] if rank else [0, 1], use_local_synchronization=True) if rank < 2 else None
    if later is not None:  # the members find each other: their name counts the groups that each is in
        dist.barrier(later)


def test_a_node_of_one_rank_is_in_as_many_groups_as_the_others(ranks: Ranks) -> None:
    ranks.run(on_uneven_nodes, world_size=3, timeout=20, fresh=True)


def inherited(rank: int, world_size: int, store: Path) -> list[timedelta]:
    another_world(rank, world_size, store, 77)
    with on_node(rank):
        return [c10d.timeout(groups.resolve(group)) for group in ("world", 2)]


def test_the_time_out_is_the_default_groups(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(inherited, tmp_path / "store", world_size=4) == [[timedelta(seconds=77)] * 2] * 4


def late(rank: int, world_size: int, store: Path, group: object, absent: int) -> str:
    another_world(rank, world_size, store, 2)
    if rank == absent:
        return ""
    with pytest.raises(RuntimeError) as refusal:
        trained(group, rank)
    return str(refusal.value)


@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("group", ["world", "node", 2])
def test_a_rank_that_does_not_come_is_named_within_the_time_out(
    ranks: Ranks, tmp_path: Path, group: object, absent: int
) -> None:
    said = ranks.run(late, tmp_path / "store", group, absent, world_size=4, timeout=30)
    assert said.pop(absent) == ""
    for message in said:
        assert message.startswith("layer SyncBatchNorm1d(3) forward: group=")
        assert f"timed out in the store: rank {absent} did not come within 2 s" in message
        assert "pass a ProcessGroup" in message
        assert "\n" not in message


def gone(rank: int, world_size: int, store: Path, group: object) -> str:
    another_world(rank, world_size, store, 2)
    trained(group, rank)
    ends = c10d.default_store()
    if rank == 1:  # alive, and does not come
        ends.wait(["rank 0 ends"], timedelta(seconds=60))
        return ""
    with pytest.raises(RuntimeError) as refusal:
        trained(group, rank)
    ends.set("rank 0 ends", "")
    return str(refusal.value)


@pytest.mark.parametrize("group", ["world", 2])
def test_an_all_reduce_gives_up_within_the_time_out(ranks: Ranks, tmp_path: Path, group: object) -> None:
    message, _ = ranks.run(gone, tmp_path / "store", group, world_size=2, timeout=30)
    assert message.startswith("layer SyncBatchNorm1d(3) forward: ")


def which(rank: int, world_size: int) -> None:
    world = dist.group.WORLD
    before = c10d.default_store().num_keys()
    with messages() as sent:
        own = groups.resolve("world")
    assert len(sent) == 0
    assert own is not None
    assert own is not world
    assert dist.get_process_group_ranks(own) == list(range(world_size))
    assert groups.resolve(world_size) is own
    assert groups.resolve("node") is own
    assert groups.resolve(1) is None
    assert groups.resolve(groups.parse(world)) is world
    dist.barrier()
    assert len(c10d.registered()) == 2
    ours = c10d.default_store()
    dist.barrier()
    assert not any(ours.check([f"syncbn/groups/{n}/{key}"]) for n in (1, 2) for key in ("plan", "read", "0", "1"))
    assert before >= 0


def test_one_group_serves_world_and_whatever_is_the_whole_world(ranks: Ranks) -> None:
    ranks.run(which, world_size=2, fresh=True)


def switched_off(rank: int, world_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNCBN_OWN_GROUP", "0")
        assert groups.resolve("world") is dist.group.WORLD
        assert groups.resolve(world_size) is dist.group.WORLD
        assert groups.resolve("node") is dist.group.WORLD
        assert len(c10d.registered()) == 1
        trained("world", rank)


def test_the_own_group_can_be_switched_off(ranks: Ranks) -> None:
    ranks.run(switched_off, world_size=2, fresh=True)


def one_rank(rank: int, world_size: int) -> None:
    assert [groups.resolve(group) for group in ("world", "node", 1)] == [dist.group.WORLD] * 3
    assert len(c10d.registered()) == 1


def test_one_rank_makes_no_group(ranks: Ranks) -> None:
    ranks.run(one_rank, world_size=1, fresh=True)


def after_destruction(rank: int, world_size: int, store: Path) -> None:
    for number in range(3):
        another_world(rank, world_size, store.with_name(str(number)), 20)
        trained("world", rank)
        trained(1, rank)
        made = weakref.ref(groups.resolve("world"))
        assert made() is not None
    dist.destroy_process_group()
    gc.collect()
    assert made() is None  # its threads and connections are gone with it


def test_nothing_outlives_the_world(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(after_destruction, tmp_path / "store", world_size=2)


WIDTH = 600  # a Linear(WIDTH, WIDTH) is more than DistributedDataParallel's first bucket of 1 MB


class Branching(nn.Module):
    """Batch norms registered before what runs between them, which differs from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norms = nn.Linear(3, WIDTH), nn.ModuleList([nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)])
        self.branches, self.head = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)]), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, branch: int) -> Tensor:
        x = self.norms[0](self.first(x)).relu()
        y: Tensor = self.head(self.norms[1](self.branches[branch](x)).relu())
        return y


def beside_buckets(rank: int, world_size: int, options: dict) -> Tensor:
    torch.manual_seed(0)
    net = syncbn.convert(Branching())
    model = DistributedDataParallel(net, bucket_cap_mb=1, **options)
    for step in range(3):
        branch = rank if "find_unused_parameters" in options else 0
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        if step == 1 and "static_graph" not in options:
            with model.no_sync():
                model(x, branch).square().mean().backward()
        model(x, branch).square().mean().backward()
    return net.norms[1].running_mean


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_all_reduces_do_not_meet_gradient_buckets(ranks: Ranks, options: dict) -> None:
    first, second = ranks.run(beside_buckets, options, world_size=2, fresh=True)
    assert torch.equal(first, second)
