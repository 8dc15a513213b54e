"""The plain layer on the CPU gives bit by bit what the way for all other layers gives, and is taken where it should."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import syncbn
from syncbn.nn.autograd import on_cpu
from syncbn.nn.comm import all_reduce, lockstep, observer
from syncbn.testing import force_exchange
from tests.support.compiled import needs_library
from tests.support.ranks import Ranks

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "rows": lambda x: x.flatten(1)[:, :6].contiguous(),
}
LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "average": {"momentum": None},
    "plain": {"affine": False},
    "untracked": {"track_running_stats": False},
    "biased": {"biased_running_var": True},
    "half": {"dtype": torch.bfloat16},
}


@contextmanager
def counted(taken: list[bool], allowed: bool) -> Iterator[None]:
    real = on_cpu.normalize

    def normalize(*args: Any) -> Tensor | None:
        y = real(*args) if allowed else None
        taken.append(y is not None)
        return y

    with mock.patch.object(on_cpu, "normalize", normalize):
        yield


def steps(rank: int, layout: str, options: dict[str, Any], dtype: torch.dtype, allowed: bool) -> tuple[Any, list[bool]]:
    """Two steps of a layer whose ranks hold batches of different sizes, one of which is empty in the second."""
    taken: list[bool] = []
    torch.manual_seed(rank)
    layer = syncbn.SyncBatchNorm(6, **options)
    seen: list[Tensor] = []
    for size in ((3 + rank), 4 * rank):
        x = LAYOUTS[layout](torch.randn(size, 6, 5, 4).to(dtype)).requires_grad_()
        with counted(taken, allowed):
            y = layer(x)
        y.backward(torch.randn(y.shape).to(dtype))
        seen += [y.detach(), x.grad]
    seen += [p.grad for p in layer.parameters()]
    strides = [t.stride() for t in seen]
    return [*seen, *layer.buffers(), strides], taken


def both(rank: int, world_size: int, layout: str, layer: str, dtype: torch.dtype) -> list[bool]:
    fast, taken = steps(rank, layout, LAYERS[layer], dtype, allowed=True)
    slow, _ = steps(rank, layout, LAYERS[layer], dtype, allowed=False)
    assert fast.pop() == slow.pop()
    for a, b in zip(fast, slow, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)
    return taken


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_are_bitwise_those_of_the_way_for_all_layers(
    ranks: Ranks, layout: str, layer: str, dtype: torch.dtype
) -> None:
    first, second = ranks.run(both, layout, layer, dtype, world_size=2)
    for_it = dtype != torch.float64 and layout != "transposed"
    # Running statistics of another type, and averages, which need the count first, are for the other way.
    for_it = for_it and layer not in ("average", "half")
    assert first == [for_it, False], "rank 0 has an empty batch in its second step"
    assert second == [for_it, for_it]


def ways(rank: int, world_size: int) -> None:
    x = torch.randn(4, 6, 3, 3)
    layer = syncbn.SyncBatchNorm2d(6)
    taken: list[bool] = []
    with force_exchange(), counted(taken, allowed=True):
        layer(x)
        with torch.no_grad():
            layer(x)
        layer(x.requires_grad_())
        assert taken == [True] * 3
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0].sum().backward()
        taken.clear()
        lockstep.debug()
        try:
            layer(x)
        finally:
            lockstep.debug(False)
        torch.func.vmap(syncbn.SyncBatchNorm2d(6, track_running_stats=False))(torch.randn(2, 4, 6, 3, 3))
        layer.weight = nn.Parameter(torch._neg_view(layer.weight.detach()))
        layer(x)
        assert not any(taken)
        assert len(taken) == 3
        taken.clear()
        layer(x, residual=x)
        layer(x, act="relu")
        layer(x, torch.ones(4, 3, 3, dtype=torch.bool))
        layer.eval()(x)
        assert not taken


@needs_library
def test_what_is_not_plain_goes_the_way_for_all_layers(ranks: Ranks) -> None:
    ranks.run(ways, world_size=1)


def frozen(rank: int, world_size: int, trained: tuple[bool, bool], affine: bool, allowed: bool) -> tuple[Any, ...]:
    """A step of a layer whose inputs need a gradient on the ranks that ``trained`` says; and its all-reduces."""
    layer = syncbn.SyncBatchNorm2d(3).requires_grad_(affine)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(rank)).requires_grad_(trained[rank])
    taken: list[bool] = []
    with counted(taken, allowed), mock.patch.object(all_reduce, "all_sum", wraps=all_reduce.all_sum) as all_sum:
        y = layer(x)
        if y.requires_grad:
            y.square().sum().backward()
    assert taken == [allowed]
    return all_sum.call_count, y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def frozen_both_ways(rank: int, world_size: int, trained: tuple[bool, bool], affine: bool) -> int:
    (calls, *fast), (calls_of_others, *slow) = (frozen(rank, world_size, trained, affine, way) for way in (True, False))
    assert calls == calls_of_others
    for a, b in zip(fast, slow, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    return calls


@needs_library
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("trained", "all_reduces"), [((False, False), 1), ((False, True), 2), ((True, True), 2)])
def test_ranks_all_reduce_backward_if_the_input_of_any_needs_it(
    ranks: Ranks, trained: tuple[bool, bool], affine: bool, all_reduces: int
) -> None:
    assert ranks.run(frozen_both_ways, trained, affine, world_size=2) == [all_reduces] * 2


def differentiated_twice(rank: int, world_size: int, allowed: bool) -> Tensor:
    """The derivative of the weight's gradient, where no rank's input needs a gradient."""
    layer = syncbn.SyncBatchNorm2d(3)
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(rank))
    with counted([], allowed):
        y = layer(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), layer.weight, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), layer.weight)[0]


@needs_library
def test_a_gradient_with_a_graph_uses_the_shared_statistics_of_a_frozen_input(ranks: Ranks) -> None:
    fast, slow = (ranks.run(differentiated_twice, allowed, world_size=2) for allowed in (True, False))
    assert all(map(torch.equal, fast, slow))


def refusals(rank: int, world_size: int) -> None:
    layer = syncbn.SyncBatchNorm1d(3)
    with force_exchange(), counted([], allowed=True), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1, 3))
    x = torch.randn(4, 3, requires_grad=True)
    kept = (layer.running_mean * x).sum()
    with force_exchange():
        layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@needs_library
def test_one_value_and_a_stale_running_mean_are_refused(ranks: Ranks) -> None:
    ranks.run(refusals, world_size=1)


def compiled_graphs(rank: int, world_size: int) -> int:
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = torch.compile(syncbn.SyncBatchNorm2d(3), backend=counter)
    x = torch.randn(4, 3, 2, 2)
    with force_exchange():
        layer(x)
        with mock.patch.object(observer, "observer", mock.Mock()):
            layer(x)
    return counter.frame_count


@needs_library
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own doing
def test_an_observer_compiles_no_second_graph(ranks: Ranks) -> None:
    assert ranks.run(compiled_graphs, world_size=1) == [1]
