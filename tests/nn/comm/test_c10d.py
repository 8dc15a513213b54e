"""The private parts of torch that the layer reaches for are there, and mean what they did in torch 2.13."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn.comm import c10d
from tests.support.ranks import Ranks


def timeouts(rank: int, world_size: int, detail: bool) -> list[timedelta]:
    if detail:
        dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        made = [dist.new_group([0], timeout=timedelta(seconds=n)) for n in (7, 90)]
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    if not detail:  # torch cannot change it there
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=8), made[0])
    return [c10d.timeout(group) for group in made]


@pytest.mark.parametrize("detail", [False, True])
def test_a_time_out_is_that_of_the_group(ranks: Ranks, detail: bool) -> None:
    expected = [timedelta(seconds=7 if detail else 8), timedelta(seconds=90)]
    assert ranks.run(timeouts, detail, world_size=1, fresh=True) == [expected]


def registry(rank: int, world_size: int) -> None:
    made = dist.new_group([0])
    assert c10d.registered() == [dist.group.WORLD, made]
    assert c10d.is_registered(made)
    dist.destroy_process_group(made)
    assert not c10d.is_registered(made)
    assert not c10d.is_registered(None)
    store = c10d.default_store()
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_registered_groups_and_the_store(ranks: Ranks) -> None:
    ranks.run(registry, world_size=1, fresh=True)


class Asks(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = c10d.active_join()
        return super().forward(x)


def joins(rank: int, world_size: int) -> None:
    inner = Asks(2, 2)
    model = DistributedDataParallel(inner)
    model(torch.ones(1, 2))
    assert inner.seen is None
    for throws in (False, True):
        with Join([model], throw_on_early_termination=throws):
            assert c10d.active_join() is None  # outside a forward pass
            model(torch.ones(1, 2))
            assert (inner.seen.enable, inner.seen.is_first_joinable) == (True, True)
            assert inner.seen.throw_on_early_termination is throws
    with model.join(enable=False):
        model(torch.ones(1, 2))
        assert inner.seen is None


def test_the_join_around_a_forward_pass(ranks: Ranks) -> None:
    ranks.run(joins, world_size=1, fresh=True)


def test_a_function_is_marked_as_torchs_own_decorator_marks_it() -> None:
    def ours() -> None: ...

    def torchs() -> None: ...

    assert vars(c10d.constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(torchs))
