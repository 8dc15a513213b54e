"""Debug mode: ranks out of step raise on every rank, naming the layer that each is at, within seconds."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.nn.comm import groups
from tests.support.ranks import Ranks


def net(channels: int = 4) -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(c, channels, 1), nn.BatchNorm2d(channels)) for c in (3, channels, channels)]
    return syncbn.convert(nn.Sequential(*layers))


def step(model: nn.Module) -> str:
    """One step of training in debug mode; what was raised."""
    syncbn.debug()
    start = time.monotonic()
    try:
        model(torch.randn(2, 3, 4, 4)).square().sum().backward()
        dist.barrier()
    except RuntimeError as error:
        assert time.monotonic() - start < 20
        return str(error)
    finally:
        syncbn.debug(False)
    return "in step"


def out_of_step(rank: int, world_size: int, how: str) -> str:
    model = net(5 if how == "other channels" and rank else 4)
    if rank and how == "middle skipped":
        model[1][1] = nn.Identity()
    elif rank and how == "last skipped":
        model[2][1] = nn.Identity()
    elif rank and how == "other order":
        model[0][1], model[1][1] = model[1][1], model[0][1]
    elif rank and how == "rank gone":
        time.sleep(6)
        return "gone"
    return step(model)


@pytest.mark.parametrize(
    ("how", "here", "there"),
    [
        ("in step", None, None),
        ("middle skipped", "1.1 forward", "2.1 forward"),
        ("last skipped", "2.1 forward", "1.1 backward"),
        ("other order", "0.1 forward", "1.1 forward"),
        ("other channels", "0.1 forward, 10 numbers", "0.1 forward, 12 numbers"),
    ],
)
def test_ranks_out_of_step_are_told_where_each_is(ranks: Ranks, how: str, here: str | None, there: str | None) -> None:
    first, second = ranks.run(out_of_step, how, world_size=2, fresh=True)
    if here is None:
        assert (first, second) == ("in step", "in step")
        return
    assert first.startswith(f"layer {here}")
    assert f"rank 1 is at {there}" in first
    assert second.startswith(f"layer {there}")
    assert f"rank 0 is at {here}" in second
    assert "(call " in first


def test_a_rank_that_does_not_come_is_named(ranks: Ranks) -> None:
    first, _ = ranks.run(late, world_size=2, fresh=True)
    assert first.startswith("layer 0.1 forward")
    assert "rank 1 did not come within 2 s (call 1)" in first


def late(rank: int, world_size: int) -> str:
    groups.resolve("world")  # making the group has a wait of its own, see tests/nn/comm/test_groups.py
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNCBN_DEBUG_TIMEOUT", "2")
        return out_of_step(rank, world_size, "rank gone")


def many_steps(rank: int, world_size: int) -> int:
    model = net()
    syncbn.debug()
    store = dist.distributed_c10d._get_default_store()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    before = store.num_keys()
    for _ in range(5):
        model(torch.randn(2, 3, 4, 4)).sum().backward()
    dist.barrier()
    syncbn.debug(False)
    return store.num_keys() - before


def test_the_store_does_not_grow(ranks: Ranks) -> None:
    assert max(ranks.run(many_steps, world_size=2, fresh=True)) <= 2


def failing_exchange(rank: int, world_size: int) -> str:
    """Without debug mode: the others are gone, and the error names our layer."""
    model = net()
    model(torch.randn(2, 3, 4, 4))
    if rank == 1:
        dist.destroy_process_group()
        return ""
    try:
        model(torch.randn(2, 3, 4, 4))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_failed_exchange_names_the_layer(ranks: Ranks) -> None:
    first, _ = ranks.run(failing_exchange, world_size=2, fresh=True)
    assert first.startswith("layer 0.1 forward: ")
