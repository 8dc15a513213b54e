"""The private parts of torch that the layer reaches for are there, and mean what they did in torch 2.13."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join, Joinable
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn.comm import c10d
from tests.support.private_names import private_names
from tests.support.ranks import Ranks


class Joins(Joinable):
    def __init__(self) -> None:
        super().__init__()

    def join_hook(self, **_: Any) -> None: ...

    join_device = join_process_group = None


def a_marked_function() -> Any:
    return torch.compiler.assume_constant_result(lambda: None)


OWNERS: dict[str, Callable[[], Any]] = {
    "_get_default_store": lambda: dist.distributed_c10d,
    "_world": lambda: dist.distributed_c10d,
    "_device_types": lambda: dist.ProcessGroup,
    "_get_backend": lambda: dist.ProcessGroup,
    "_timeout": lambda: dist.ProcessGroupGloo._Options,
    "_active_ddp_module": lambda: DistributedDataParallel,
    "_join_config": Joins,
    "_set_params_and_buffers_to_ignore_for_model": lambda: DistributedDataParallel,
    "_dynamo_marked_constant": a_marked_function,
    "_functional_collectives": lambda: torch.distributed,
    "_c10d_functional": lambda: torch.ops,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", OWNERS)
def test_torch_has_the_attribute(name: str) -> None:
    assert hasattr(OWNERS[name](), name), name


def test_every_private_name_in_the_module_has_an_owner() -> None:
    assert private_names(Path(c10d.__file__)) == OWNERS.keys()


def test_collectives_are_in_the_namespaces_that_are_named() -> None:
    operations = zip(c10d.NAMESPACES, ("allreduce_", "all_reduce", "reduce_scatter_tensor"), strict=True)
    assert all(hasattr(getattr(torch.ops, namespace), name) for namespace, name in operations)
    assert [str(operation) for operation in c10d.all_reduce_operations()] == [
        "_c10d_functional.all_reduce.default",
        "_c10d_functional.wait_tensor.default",
    ]


def test_names_that_ddp_ignores_are_set_and_restored() -> None:
    net = nn.Linear(1, 1)
    assert c10d.ignored_by_ddp(net) is None
    c10d.set_ignored_by_ddp(net, ["bias"])
    assert c10d.ignored_by_ddp(net) == ["bias"]
    c10d.restore_ignored_by_ddp(net, ["weight"])
    assert c10d.ignored_by_ddp(net) == ["weight"]
    for _ in range(2):
        c10d.restore_ignored_by_ddp(net, None)
        assert c10d.ignored_by_ddp(net) is None


def reduced(rank: int, world_size: int) -> list[float]:
    x = torch.ones(2) + rank
    return [*c10d.functional_all_reduce(x, dist.group.WORLD).tolist(), *x.tolist()]


def test_a_functional_all_reduce_leaves_its_argument(ranks: Ranks) -> None:
    assert ranks.run(reduced, world_size=2) == [[3, 3, 1, 1], [3, 3, 2, 2]]


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
