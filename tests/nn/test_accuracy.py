"""Digits: kept at any offset, for any count, in any layout, also on the routes that only large inputs take.

Everywhere float32 (or less) against one process in float64 on the same values.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.nn import statistics
from syncbn.nn.kernels import dispatch
from syncbn.testing import without_native
from tests.nn.support.oracle import Outcome, Step, check, close, on_a_rank, one_process
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Ranks

ROADS = {"compiled": nullcontext, "torch": without_native}


@pytest.fixture(params=ROADS, autouse=True)
def road(request: pytest.FixtureRequest) -> Iterator[str]:
    """Compiled code, as far as it takes what is there, and torch's kernels; in this process."""
    with ROADS[request.param]():
        yield request.param


def on_a_road(rank: int, world_size: int, road: str, layer: nn.Module, steps: list[Step]) -> Outcome:
    with ROADS[road]():
        return on_a_rank(rank, world_size, layer, steps)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, in float64."""
    dims = [d for d in range(x.dim()) if d != 1]
    return x.double().mean(dims), x.double().var(dims, correction=0)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1.99, 2.01, 100.0, 1e4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 16, 30, 30), (3, 7, 57, 59), (40, 5, 90, 90), (4, 1500, 26, 26)], ids=str)
def test_statistics_of_many_values(shape: tuple[int, ...], layout: str, offset: float) -> None:
    # 57 * 59 * 3 is odd: rows cannot be put side by side. 324,000 values a channel are more than one block of rows.
    x = LAYOUTS[layout](normal(*shape, seed=0) * 3 + 3 * offset)
    mean, var = moments(x)
    seen = statistics.unpack(dispatch.local_sums(x).sums)
    assert ((seen.mean - mean).abs() / var.sqrt()).max() < 2e-6
    assert ((seen.var - var).abs() / var).max() < 1e-5


def test_rows_and_columns_of_any_stride() -> None:
    x = normal(3000, 2, 24, seed=1).transpose(1, 2)  # channels innermost, as after a transformer's block
    table = normal(5001, 9, seed=2)
    for values in (x, table, table[:, 2:7], table[::2], x[:, ::2], normal(9, 6000, seed=3).t()):
        mean, var = moments(values)
        seen = statistics.unpack(dispatch.local_sums(values).sums)
        close(seen.mean, mean, 1e-6, "mean")
        close(seen.var, var, 1e-5, "var")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_half_precision_are_as_good_as_of_float32(dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](normal(16, 5, 90, 90, seed=0) + 1).to(dtype)
    mean, var = moments(x)
    seen = statistics.unpack(dispatch.local_sums(x).sums)
    close(seen.mean, mean, 1e-6, "mean")
    close(seen.var, var, 1e-5, "var")


@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids="-".join)
@pytest.mark.parametrize(("offset", "tolerance"), [(0.5, 1e-5), (30.0, 1e-5)])
@pytest.mark.parametrize("cut", [[6, 6], [3, 9]], ids=str)
def test_large_inputs(
    ranks: Ranks, road: str, cut: list[int], offset: float, tolerance: float, layouts: tuple[str, str]
) -> None:
    """Large enough for every route that large inputs take, and input and gradient of each layout."""
    x_layout, dy_layout = layouts
    x = [LAYOUTS[x_layout](normal(n, 33, 40, 40, seed=rank) + offset + rank) for rank, n in enumerate(cut)]
    dy = [LAYOUTS[dy_layout](normal(n, 33, 40, 40, seed=2 + rank)) for rank, n in enumerate(cut)]
    # Gradients of parameters add up 19,200 values: the tolerance is for numbers of size 1, not of size 139.
    steps = [Step(x, [piece / 139 for piece in dy])]
    layer = parameters(syncbn.SyncBatchNorm2d(33))
    outcomes = ranks.run(on_a_road, road, layer, steps, world_size=2)
    check(outcomes, one_process(layer, steps), tolerance)
    for outcome in outcomes:
        expected = torch.channels_last if x_layout == "channels_last" else torch.contiguous_format
        assert outcome.y[0].is_contiguous(memory_format=expected)
        assert outcome.dx[0].is_contiguous(memory_format=expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("biased", [False, True])
def test_mean_of_ten_thousand_deviations(ranks: Ranks, road: str, biased: bool, layout: str) -> None:
    """Ranks whose means are a deviation apart: the rounding of a mean in float32 is 1e-3 of a deviation here."""
    x = [LAYOUTS[layout](normal(n, 5, 8, 8, seed=rank) + 1e4 + rank) for rank, n in enumerate([5, 3])]
    dy = [LAYOUTS[layout](normal(n, 5, 8, 8, seed=2 + rank)) for rank, n in enumerate([5, 3])]
    steps = [Step(x, dy)]
    layer = parameters(syncbn.SyncBatchNorm2d(5, momentum=1.0, biased_running_var=biased))
    expected = one_process(layer, steps)
    _, var = moments(torch.cat(x))
    n = 8 * 64
    for rank, outcome in enumerate(ranks.run(on_a_road, road, layer, steps, world_size=2)):
        relative = (outcome.running_var.double() * (1 if biased else (n - 1) / n) - var).abs() / var
        assert relative.max() < 1e-5
        # Centred before they are scaled: multiplied out, float32 would leave three digits here.
        close(outcome.y[0], expected.y[0][rank], 1e-5, "y")
        close(outcome.dx[0], expected.dx[0][rank], 1e-5, "dx")


def test_a_rank_near_zero_and_a_rank_far_away(ranks: Ranks, road: str) -> None:
    """Each rank decides by itself whether its values need centring; the other need not agree."""
    x = [normal(4, 5, 8, 8, seed=0), normal(4, 5, 8, 8, seed=1) * 0.01 + 300]
    dy = [normal(4, 5, 8, 8, seed=2), normal(4, 5, 8, 8, seed=3)]
    steps = [Step(x, dy)]
    layer = parameters(syncbn.SyncBatchNorm2d(5))
    check(ranks.run(on_a_road, road, layer, steps, world_size=2), one_process(layer, steps), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_in_half_precision_hold_rounded_statistics(ranks: Ranks, road: str, dtype: torch.dtype) -> None:
    """Counts beyond float16's largest number (D4 of torch.nn.SyncBatchNorm) included: 70,000 values a channel."""
    x = [(normal(70, 2, 25, 40, seed=rank) * 2 + 3).to(dtype) for rank in range(2)]
    steps = [Step(x, [torch.zeros_like(piece) for piece in x])]
    layer: nn.Module = syncbn.SyncBatchNorm2d(2, momentum=1.0).to(dtype)
    mean, var = moments(torch.cat(x))
    n = 2 * 70 * 1000
    for outcome in ranks.run(on_a_road, road, layer, steps, world_size=2):
        assert outcome.running_mean.dtype == outcome.running_var.dtype == dtype
        torch.testing.assert_close(outcome.running_mean, mean.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(
            outcome.running_var, (var * n / (n - 1)).to(dtype), rtol=torch.finfo(dtype).eps, atol=0
        )
