"""Shuffled samples: ranks against one process that has all samples, in float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.nn import simulation
from syncbn.nn.comm import all_reduce
from tests.support.ranks import Messages, Ranks, messages

CUTS = [[4, 4], [3, 3, 3], [2, 5, 3], [5, 0, 4]]
SEED = 11


def owners(cut: list[int]) -> list[int]:
    """The rank of each sample: the first of each rank, the second of each, and so on."""
    return [rank for _, rank in sorted((k, rank) for rank, count in enumerate(cut) for k in range(count))]


def of_rank(values: Tensor, cut: list[int], rank: int) -> Tensor:
    return values[torch.tensor(owners(cut)) == rank]


def permutation(samples: int) -> Tensor:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(SEED))


def encoder() -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Conv1d(2, 4, 2), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3), nn.BatchNorm1d(3)]
    return nn.Sequential(*layers).double()


def data(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 2, 3, dtype=torch.float64, generator=generator)
    return x + torch.arange(samples).view(-1, 1, 1), torch.randn(samples, 3, dtype=torch.float64, generator=generator)


class Outcome(NamedTuple):
    y: Tensor
    dx: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    sent: list[Messages]  # forward, restore, backward


def step(net: nn.Module, x: Tensor, dy: Tensor, **how: Any) -> Outcome:
    x = x.clone().requires_grad_()
    with messages() as forward:
        shuffled = syncbn.shuffle(x, **how)
    features = net(shuffled.samples)
    with messages() as restore:
        y = shuffled.restore(features)
    with messages() as backward:
        y.backward(dy)
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return Outcome(y.detach(), x.grad, gradients, dict(net.named_buffers()), [forward, restore, backward])


def on_a_rank(rank: int, world_size: int, cut: list[int], how: dict[str, Any]) -> Outcome:
    return step(encoder(), *(of_rank(each, cut, rank) for each in data(sum(cut))), **how)


def one_process(cut: list[int], p: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Without the code under test: places of each rank are normalized by themselves; buffers are by rank."""
    x, dy = data(sum(cut))
    x.requires_grad_()
    nets = [encoder() for _ in cut]
    for net in nets[1:]:
        for name, parameter in nets[0].named_parameters():
            net.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = parameter
    outputs = torch.zeros_like(dy)
    for rank, net in enumerate(nets):
        places = (torch.tensor(owners(cut)) == rank).nonzero().flatten()
        outputs = outputs.index_copy(0, p[places], net(x[p[places]]))
    outputs.backward(dy)
    gradients = {name: parameter.grad for name, parameter in nets[0].named_parameters()}
    return outputs.detach(), x.grad, gradients, [dict(net.named_buffers()) for net in nets]


@pytest.mark.parametrize("how", ["seed", "permutation"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_ranks_compute_what_one_process_does(ranks: Ranks, cut: list[int], how: str) -> None:
    p = permutation(sum(cut))
    given = {"seed": SEED} if how == "seed" else {"permutation": p}
    y, dx, gradients, buffers = one_process(cut, p)
    outcomes = ranks.run(on_a_rank, cut, given, world_size=len(cut))
    close = {"rtol": 1e-10, "atol": 1e-12}
    for rank, outcome in enumerate(outcomes):
        torch.testing.assert_close(outcome.y, of_rank(y, cut, rank), **close)
        torch.testing.assert_close(outcome.dx, of_rank(dx, cut, rank), **close)
        torch.testing.assert_close(outcome.buffers, buffers[rank], **close)
        forward, restore, backward = ([*sent.operations] for sent in outcome.sent)
        assert forward == restore == ["allreduce", "alltoall_base"]
        assert backward == ["alltoall_base"] * 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(outcome.gradients[name] for outcome in outcomes), gradient, **close)


@pytest.mark.parametrize("world_size", [2, 3])
def test_simulated_devices_are_shuffled_as_ranks_are(ranks: Ranks, world_size: int) -> None:
    """One process with the samples in this order, without a process group: the seed gives it the same arrangement."""
    cut = [4] * world_size
    one = step(simulation.simulate(encoder(), world_size), *data(sum(cut)), seed=SEED)
    assert not any(map(len, one.sent))
    outcomes = ranks.run(on_a_rank, cut, {"seed": SEED}, world_size=world_size)
    for rank, outcome in enumerate(outcomes):
        torch.testing.assert_close(outcome.y, of_rank(one.y, cut, rank), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(outcome.dx, of_rank(one.dx, cut, rank), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outcomes[0].buffers, one.buffers, rtol=1e-10, atol=1e-12)


def of_each_type(rank: int, world_size: int, cut: list[int]) -> None:
    p = permutation(sum(cut))
    types = (torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.bool, torch.int64, torch.uint8)
    for dtype in types:
        whole = torch.arange(sum(cut) * 6).view(-1, 3, 2).to(dtype)
        x = of_rank(whole, cut, rank)
        expected = of_rank(whole[p], cut, rank)
        for view in (slice(None), (slice(None), 0, 1), (slice(None), slice(0))):  # rows of a shape, of none, of nothing
            shuffled = syncbn.shuffle(x[view], seed=SEED)
            assert torch.equal(shuffled.samples, expected[view])
            assert shuffled.samples.dtype is dtype
            assert torch.equal(shuffled.restore(shuffled.samples), x[view])
    turned = torch.complex(*torch.randn(2, cut[rank], 3)).conj()
    shuffled = syncbn.shuffle(turned, seed=SEED)
    assert torch.equal(shuffled.restore(shuffled.samples), turned)
    images = torch.randn(cut[rank], 3, 4, 4).contiguous(memory_format=torch.channels_last)
    shuffled = syncbn.shuffle(images, seed=SEED)
    assert shuffled.samples.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(shuffled.restore(shuffled.samples), images)
    nothing = syncbn.shuffle(images[:0], seed=SEED)
    assert nothing.restore(nothing.samples).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("cut", [[4, 4], [2, 0, 3]], ids=str)
def test_rows_of_any_type_and_shape(ranks: Ranks, cut: list[int]) -> None:
    ranks.run(of_each_type, cut, world_size=len(cut))


def second_derivative(x: Tensor, weight: Tensor) -> Tensor:
    """Of a function whose curvature depends on the place that a sample has in between."""
    x = x.clone().requires_grad_()
    shuffled = syncbn.shuffle(x, seed=SEED)
    y = shuffled.restore(shuffled.samples.pow(3) * weight)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return second


def second_derivative_on_a_rank(rank: int, world_size: int, cut: list[int], x: Tensor, weight: Tensor) -> Tensor:
    return second_derivative(of_rank(x, cut, rank), of_rank(weight, cut, rank))


def test_a_second_derivative_takes_both_ways_too(ranks: Ranks) -> None:
    cut = [3, 2, 4]
    x, weight = torch.randn(2, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = second_derivative(x, weight)
    weights = weight[permutation(9).argsort()]  # of each sample, at the place that it had
    torch.testing.assert_close(expected, 30 * x.pow(4) * weights.square())
    for rank, found in enumerate(ranks.run(second_derivative_on_a_rank, cut, x, weight, world_size=3)):
        torch.testing.assert_close(found, of_rank(expected, cut, rank))


def next_device(rank: int, world_size: int) -> list[float]:
    """Two views of each image: the second views move to the next device."""
    views = torch.tensor([rank + 0.1, rank + 0.1, rank + 0.2, rank + 0.2])
    first, second = torch.arange(4 * world_size).view(2, -1, world_size)
    moved = syncbn.shuffle(views, permutation=torch.cat([first.flatten(), second.roll(1, 1).flatten()]))
    assert torch.equal(moved.restore(moved.samples), views)
    return moved.samples.tolist()


def test_second_views_on_the_next_device(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks.run(next_device, world_size=3)):
        other = (rank - 1) % 3
        assert found == pytest.approx([rank + 0.1, rank + 0.1, other + 0.2, other + 0.2])


def used_groups(rank: int, world_size: int) -> tuple[int, bool, list[float]]:
    used = []
    original = dist.all_to_all_single

    def spy(*args: Any, group: Any) -> Any:
        used.append(group)
        return original(*args, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", spy)
        of_pair = syncbn.shuffle(torch.full((2,), float(rank)), group=2, permutation=[1, 0, 3, 2])
        alone = syncbn.shuffle(torch.arange(3.0), group=1, permutation=[2, 0, 1])
        with all_reduce.alone():
            syncbn.shuffle(torch.arange(3.0), permutation=[0])
        syncbn.shuffle(torch.arange(3.0), seed=1)
    assert alone.samples.tolist() == [2, 0, 1]
    return len(used), any(group is dist.group.WORLD for group in used), of_pair.samples.tolist()


def test_it_has_a_group_of_its_own_and_any_group(ranks: Ranks) -> None:
    for rank, (count, default, found) in enumerate(ranks.run(used_groups, world_size=4)):
        assert (count, default) == (2, False)
        assert found == [rank ^ 1] * 2


def test_without_a_process_group_it_permutes_locally() -> None:
    x = torch.randn(7, 2, requires_grad=True)
    before = torch.get_rng_state()
    shuffled = syncbn.shuffle(x, seed=SEED)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(shuffled.samples, x[permutation(7)])
    assert not torch.equal(shuffled.samples, syncbn.shuffle(x, seed=SEED + 1).samples)
    shuffled.restore(shuffled.samples * torch.arange(7.0).view(-1, 1)).sum().backward()
    assert torch.equal(x.grad[:, 0], permutation(7).argsort().float())


def wrong(rank: int, world_size: int, what: str) -> str:
    x = torch.randn(3, 2, dtype=torch.float32)
    calls = {
        "seed": lambda: syncbn.shuffle(x, seed=rank),
        "seed and permutation": lambda: syncbn.shuffle(x, **({"seed": 0} if rank else {"permutation": range(6)})),
        "type": lambda: syncbn.shuffle(x.double() if rank else x, seed=0),
        "shape": lambda: syncbn.shuffle(x[:, :1] if rank else x, seed=0),
        "gradient": lambda: syncbn.shuffle(x.requires_grad_(rank == 0), seed=0),
        "numbers": lambda: syncbn.shuffle(x, permutation=[0, 1, 2]),
        "rows": lambda: syncbn.shuffle(x, seed=0).restore(x[rank:]),
        "row": lambda: syncbn.shuffle(x, seed=0).restore(x if rank else x.half()),
        "another operation": lambda: syncbn.SyncBatchNorm1d(2)(x) if rank else syncbn.shuffle(x, seed=0),
    }
    with pytest.raises(RuntimeError if what == "another operation" else ValueError) as caught:
        calls[what]()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "first", "second"),
    [
        ("seed", "rank 0 has seed=0, and rank 1 differs", "rank 1 has seed=1, and rank 0 differs"),
        ("seed and permutation", "rank 0 has another permutation, of 6 numbers", "rank 1 has seed=0"),
        ("type", "rank 0 has rows of shape (2,) and type float32", "rank 1 has rows of shape (2,) and type float64"),
        ("shape", "rank 0 has rows of shape (2,)", "rank 1 has rows of shape (1,)"),
        ("gradient", "rank 0 has a need of gradients, and rank 1 differs", "rank 1 has no need of gradients"),
        ("numbers", "of 3 numbers: all ranks together have 6 samples", "it must have each of 0 to 5 once"),
        ("rows", "rank 1 has another number of rows", "y has 2 rows, and shuffle returned 3 samples"),
        ("row", "restore after shuffle: rank 0 has rows of shape (2,) and type float16", "type float32"),
        ("another operation", "shuffle forward", "SyncBatchNorm1d(2) forward"),
    ],
)
def test_ranks_that_do_not_fit_together_raise_on_every_rank(ranks: Ranks, what: str, first: str, second: str) -> None:
    found = ranks.run(wrong, what, world_size=2, timeout=20, fresh=True)
    assert first in found[0]
    assert second in found[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: syncbn.shuffle(x), ValueError, "pass either seed="),
        (lambda x: syncbn.shuffle(x, seed=1, permutation=[0, 1, 2]), ValueError, "pass either seed="),
        (lambda x: syncbn.shuffle(x, permutation=[0, 1, 1]), ValueError, "each of 0 to 2 once"),
        (lambda x: syncbn.shuffle(x[:0], permutation=[0]), ValueError, "have 0 samples, so it must have no number"),
        (lambda x: syncbn.shuffle(x, permutation=torch.ones(3)), TypeError, "whole numbers"),
        (lambda x: syncbn.shuffle(x, permutation=torch.tensor(1)), TypeError, "one dimension"),
        (lambda x: syncbn.shuffle(x, seed=0.5), TypeError, "seed=0.5 is no whole number"),
        (lambda x: syncbn.shuffle(x, seed=2**70), ValueError, "use a number of 64 bits"),
        (lambda x: syncbn.shuffle(x.sum(), seed=1), ValueError, r"its shape must be \(N, ...\)"),
        (lambda x: syncbn.shuffle([x], seed=1), TypeError, "list is no Tensor"),
        (lambda x: syncbn.shuffle(x, seed=1, group="ranks"), ValueError, 'group="ranks" is not known'),
        (lambda x: syncbn.shuffle(x, seed=1).restore(x[1:]), ValueError, "y has 2 rows, and shuffle returned 3"),
    ],
)
def test_wrong_arguments(call: Callable[[Tensor], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(torch.randn(3, 2))
    assert "\n" not in str(caught.value)


def compiled(rank: int, world_size: int) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        shuffled = syncbn.shuffle(x, seed=SEED)
        return shuffled.restore(net(shuffled.samples)) + 1

    x = data(4 * world_size)[0][rank::world_size]
    run = torch.compile(forward, backend="eager")
    for samples in (4, 3):
        torch.testing.assert_close(run(encoder(), x[:samples]), forward(encoder(), x[:samples]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_code_has_a_graph_break(ranks: Ranks) -> None:
    ranks.run(compiled, world_size=2, timeout=120)
