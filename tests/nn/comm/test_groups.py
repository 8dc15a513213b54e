"""Who shares statistics: what is accepted, what is refused and when, and that a group is plain data."""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.nn.comm import groups
from tests.nn.support.oracle import CHANNELS, SPATIAL, Step, check, make_steps, on_a_rank, one_process
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Ranks, messages

LAUNCHERS = (
    "GROUP_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_NODEID",
    "SLURM_PROCID",
    "NODE_RANK",
)  # where a rank learns of its node


def a_layer(group: object) -> nn.Module:
    return parameters(syncbn.SyncBatchNorm2d(CHANNELS, group=group, dtype=torch.float64))


def of_ranks(steps: list[Step], members: list[int]) -> list[Step]:
    return [Step([step.x[rank] for rank in members], [step.dy[rank] for rank in members]) for step in steps]


@contextmanager
def launched(variables: dict[str, str]) -> Iterator[None]:
    others = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    with mock.patch.dict(os.environ, others | variables, clear=True):
        yield


def on_a_node(rank: int, world_size: int, names: list[dict[str, str]], layer: nn.Module, steps: list[Step]) -> object:
    with launched(names[rank]):
        return on_a_rank(rank, world_size, layer, steps)


def assert_shared_within(ranks: Ranks, nodes: list[list[int]], group: object, names: list[dict[str, str]]) -> None:
    """Trains with ``group`` and asserts that each of ``nodes`` did what one process does with that node's batch."""
    world_size = sum(map(len, nodes))
    steps = make_steps([4, 2, 3, 5][:world_size], SPATIAL["4d"], count=3)
    outcomes = ranks.run(on_a_node, names, a_layer(group), steps, world_size=world_size, fresh=True)
    for members in nodes:
        expected = one_process(a_layer(group), of_ranks(steps, members))
        check([outcomes[rank] for rank in members], expected, 1e-10)
    firsts = [outcomes[members[0]].running_mean for members in nodes]
    assert all(not torch.equal(firsts[0], other) for other in firsts[1:])


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ("cluster", ValueError),
        ("World", ValueError),
        ("", ValueError),
        ("2", ValueError),
        (0, ValueError),
        (-1, ValueError),
        (True, TypeError),
        (False, TypeError),
        (2.0, TypeError),
        (np.float64(2), TypeError),
        (np.bool_(True), TypeError),
        (torch.tensor(True), TypeError),
        (None, TypeError),
        ([0, 1], TypeError),
        ((), TypeError),
        ((0, "1"), TypeError),
        ({"world"}, TypeError),
        (torch.zeros(2), TypeError),
        (np.zeros(2), TypeError),
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["layer", "convert", "function"])
def test_a_word_or_number_that_is_no_group_is_refused_at_once(
    where: str, group: object, error: type[Exception]
) -> None:
    net = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    ways = {
        "layer": lambda: syncbn.SyncBatchNorm2d(CHANNELS, group=group),
        "convert": lambda: syncbn.convert(net, group=group),
        "function": lambda: syncbn.sync_batch_norm(torch.ones(4, CHANNELS), None, None, training=True, group=group),
    }
    with pytest.raises(error, match="group"):
        ways[where]()
    assert type(net[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("group", ["world", "node", 1, 2, 64, (0, 1)])
def test_a_group_is_kept_as_plain_data(group: object) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, group=group)
    assert layer.group == group
    assert f"group={group!r}" in repr(layer)


@pytest.mark.parametrize("group", ["world", "node", 1, 2, (0, 1)])
def test_without_a_process_group_any_group_is_this_process_alone(group: object) -> None:
    layer, twin = a_layer(group), parameters(nn.BatchNorm2d(CHANNELS, dtype=torch.float64))
    x = torch.randn(4, CHANNELS, 2, 2, dtype=torch.float64)
    assert torch.equal(layer(x), twin(x))
    assert torch.equal(layer.running_var, twin.running_var)
    assert groups.size(layer.group) == 1


def first_use(rank: int, world_size: int, layer: nn.Module, x: Tensor) -> tuple[int, str]:
    with messages() as sent, pytest.raises(ValueError, match=r"group|ranks") as refusal:
        layer(x)
    return len(sent), str(refusal.value)


@pytest.mark.parametrize("group", [2, 4, 64])
def test_a_size_that_does_not_divide_the_world_is_refused_with_those_that_do(ranks: Ranks, group: int) -> None:
    layer, x = a_layer(group), torch.ones(4, CHANNELS, 2, 2, dtype=torch.float64)
    for sent, message in ranks.run(first_use, layer, x, world_size=3):
        assert sent == 0
        assert f"group={group}" in message
        assert "world size 3" in message
        assert "[1, 3]" in message


@pytest.mark.parametrize("group", [np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)], ids=repr)
def test_a_number_may_be_numpys_or_torchs(group: object) -> None:
    kept = syncbn.SyncBatchNorm2d(CHANNELS, group=group).group
    assert type(kept) is int
    assert kept == 2


def outside_its_group(rank: int, world_size: int, layer: nn.Module, x: Tensor) -> tuple[int, str] | None:
    _ = dist.new_group([0, 1])  # found by its ranks
    if rank == 2:
        return first_use(rank, world_size, layer, x)
    layer(x)
    return None


def test_a_rank_outside_the_group_of_its_layer_is_refused_before_any_message(ranks: Ranks) -> None:
    layer, x = a_layer((0, 1)), torch.randn(4, CHANNELS, 2, 2, dtype=torch.float64)
    _, _, (sent, message) = ranks.run(outside_its_group, layer, x, world_size=3)
    assert sent == 0
    assert "rank 2 is not in group (0, 1)" in message


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_group_1_is_per_device_batch_norm(ranks: Ranks, world_size: int) -> None:
    assert_shared_within(ranks, [[rank] for rank in range(world_size)], 1, [{}] * world_size)


@pytest.mark.parametrize(
    ("group", "nodes"),
    [(2, [[0, 1]]), (3, [[0, 1, 2]]), (2, [[0, 1], [2, 3]]), (4, [[0, 1, 2, 3]])],
    ids=["2_of_2", "3_of_3", "2_of_4", "4_of_4"],
)
def test_a_number_is_that_many_consecutive_ranks(ranks: Ranks, group: int, nodes: list[list[int]]) -> None:
    assert_shared_within(ranks, nodes, group, [{}] * sum(map(len, nodes)))


@pytest.mark.parametrize("variable", ["GROUP_RANK", "SLURM_NODEID", "NODE_RANK"])
def test_a_node_is_what_the_launcher_says(ranks: Ranks, variable: str) -> None:
    assert_shared_within(ranks, [[0], [1]], "node", [{variable: "0"}, {variable: "1"}])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_a_launcher_one_host_is_one_node(ranks: Ranks, world_size: int) -> None:
    assert_shared_within(ranks, [list(range(world_size))], "node", [{}] * world_size)


@pytest.mark.parametrize("nodes", [[[0, 1], [2]], [[0], [1, 2]], [[0, 2], [1]]], ids=str)
def test_nodes_may_be_uneven_and_their_ranks_scattered(ranks: Ranks, nodes: list[list[int]]) -> None:
    node_of = {rank: str(node) for node, members in enumerate(nodes) for rank in members}
    assert_shared_within(ranks, nodes, "node", [{"GROUP_RANK": node_of[rank]} for rank in range(3)])


def with_a_process_group(rank: int, world_size: int, steps: list[Step]) -> tuple:
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    layer = a_layer(group)
    return layer.group, on_a_rank(rank, world_size, layer, steps), layer


def test_a_process_group_is_kept_as_its_ranks(ranks: Ranks) -> None:
    steps = make_steps([4, 2, 3], SPATIAL["4d"], count=2)
    # That the layer comes back at all shows that it pickles after its group was in use.
    first, _, last = ranks.run(with_a_process_group, steps, world_size=3)
    assert first[0] == last[0] == first[2].group == (0, 2)
    check([first[1], last[1]], one_process(a_layer("world"), of_ranks(steps, [0, 2])), 1e-10)


@pytest.mark.parametrize("group", [(0, 1, 2), (0, 0, 1), (-1, 0, 1)], ids=str)
def test_ranks_that_the_world_does_not_have_are_refused_before_any_message(ranks: Ranks, group: tuple) -> None:
    layer, x = a_layer(group), torch.ones(4, CHANNELS, 2, 2, dtype=torch.float64)
    for sent, _ in ranks.run(first_use, layer, x, world_size=2, timeout=20, fresh=True):
        assert sent == 0


def saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied_after_use(rank: int, world_size: int, steps: list[Step], group: object) -> list[object]:
    spec = dist.new_group([0, 1]) if group == "process group" else group
    layer = syncbn.convert(nn.Sequential(nn.BatchNorm2d(CHANNELS, dtype=torch.float64)), group=spec)
    x = steps[0].x[rank]
    layer(x)
    copies = [deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved(layer)]
    y = layer(x)
    for copy in copies:
        assert copy[0].group == layer[0].group
        assert torch.equal(copy(x), y)
        assert torch.equal(copy[0].running_var, layer[0].running_var)
    return [y]


@pytest.mark.parametrize("group", ["world", "node", 1, 2, (0, 1), "process group"], ids=str)
def test_a_layer_with_a_group_in_use_copies_pickles_and_saves(ranks: Ranks, group: object) -> None:
    steps = make_steps([4, 2], SPATIAL["4d"])
    ranks.run(copied_after_use, steps, group, world_size=2)


def over_two_worlds(rank: int, world_size: int, layer: nn.Module, steps: list[Step], store: str) -> list:
    outcomes = [on_a_rank(rank, world_size, layer, steps[:1])]
    dist.destroy_process_group()
    alone = deepcopy(layer)
    alone(steps[0].x[rank])  # no world, no message, no error
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    layer.weight.grad = layer.bias.grad = None
    outcomes.append(on_a_rank(rank, world_size, layer, steps[1:]))
    return outcomes


@pytest.mark.parametrize("group", ["world", "node", 1, 2, (0, 1)], ids=str)
def test_groups_work_after_the_process_group_was_destroyed_and_made_anew(
    ranks: Ranks, group: object, tmp_path: os.PathLike
) -> None:
    layer, steps = a_layer(group), make_steps([4, 2], SPATIAL["4d"], count=2)
    outcomes = ranks.run(over_two_worlds, layer, steps, str(tmp_path / "store"), world_size=2)
    members = [[0], [1]] if group == 1 else [[0, 1]]
    for who in members:
        expected = one_process(layer, of_ranks(steps, who))
        for rank in who:
            torch.testing.assert_close(outcomes[rank][1].running_var, expected.running_var, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(outcomes[rank][1].y[0], expected.y[1][who.index(rank)], rtol=1e-10, atol=1e-10)


def test_one_layer_serves_worlds_of_other_sizes_in_turn(ranks: Ranks) -> None:
    steps = make_steps([4, 2, 3], SPATIAL["4d"])
    for world_size in (2, 3, 1, 2):
        part = of_ranks(steps, list(range(world_size)))
        check(ranks.run(on_a_rank, a_layer("world"), part, world_size=world_size), one_process(a_layer(1), part), 1e-10)


def in_two_groups_at_once(rank: int, world_size: int, layers: list[nn.Module], steps: list[Step]) -> list:
    # The ranks meet their groups in different orders: building one must not need the ranks of another.
    order = [0, 1] if rank == 0 else [1, 0]
    for which in order:
        groups.resolve(layers[which].group)
    return [on_a_rank(rank, world_size, layer, steps) for layer in layers]


def test_ranks_may_build_their_groups_in_an_order_of_their_own(ranks: Ranks) -> None:
    steps = make_steps([4, 2], SPATIAL["4d"])
    layers = [a_layer(1), a_layer(2)]
    first, second = ranks.run(in_two_groups_at_once, layers, steps, world_size=2, timeout=30, fresh=True)
    check([first[0]], one_process(layers[0], of_ranks(steps, [0])), 1e-10)
    check([second[0]], one_process(layers[0], of_ranks(steps, [1])), 1e-10)
    check([first[1], second[1]], one_process(layers[1], steps), 1e-10)
