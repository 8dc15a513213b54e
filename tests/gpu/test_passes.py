"""Triton's kernels, each against float64: on a GPU, or in Triton's interpreter."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import syncbn
from syncbn.nn.kernels import gpu, triton_tiling
from syncbn.nn.kernels import running_statistics as moving
from syncbn.nn.statistics import Moments, pack, unpack
from tests.gpu.support.steps import road

Lay = Callable[[Tensor], Tensor]
EPS = 1e-3
# Some rows, columns, channels and bytes of bits that do not fill a tile; more programs than one for a channel.
SHAPES = [(5, 3), (2, 3, 1), (3, 17, 29), (7, 3, 5, 9), (2, 70, 3, 3), (2, 2, 33, 32), (2, 5, 4, 3, 2), (9, 1, 5)]
ADDED = ("nothing", "relu", "residual", "residual+relu")


def rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture(autouse=True)
def by_triton(device: str) -> Iterator[None]:
    with road("triton", device):
        yield


@pytest.fixture(params=["whole", "split"])
def dealt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Tensors as small as these are dealt out to one program a channel, and to many."""
    if request.param == "split":
        monkeypatch.setattr(triton_tiling, "_FEW", {True: 4, False: 4})
        monkeypatch.setattr(triton_tiling, "_TILE", 64)
    for plan in (triton_tiling.reduction, triton_tiling.elementwise):
        plan.cache_clear()
    yield request.param
    for plan in (triton_tiling.reduction, triton_tiling.elementwise):
        plan.cache_clear()


def case(shape: tuple[int, ...], lay: Lay, dtype: torch.dtype, device: str, offset: float) -> list[Tensor]:
    """Input, gradient, residual, weight and bias."""
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    per_channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = normal(*shape) + offset * (1 + normal(*per_channel).abs())
    data = [lay(t.to(dtype)).to(device) for t in (x, normal(*shape), normal(*shape))]
    return [*data, normal(shape[1]).to(device), normal(shape[1]).to(device)]


def passes(x: Tensor, dy: Tensor, residual: Tensor | None, weight: Any, bias: Any, relu: bool) -> dict[str, Tensor]:
    at = gpu.shape(x)
    assert at is not None
    sums = gpu.sums(x, at)
    found = gpu.statistics(sums)
    y, bits = gpu.normalize(x, at, found, weight, bias, EPS, residual, relu)
    gate = (bias, bits) if relu else None
    both, dbeta, dgamma = gpu.gradient_sums(dy, x, at, found, weight, EPS, gate)
    dx, dresidual = gpu.input_gradient(dy, x, at, sums[0], found, weight, both, EPS, gate, residual is not None)
    torch.testing.assert_close(both.float(), torch.cat([dbeta, dgamma]), rtol=0, atol=0, equal_nan=True)
    if bits is not None:
        assert torch.equal(gpu.unpacked(bits, x, at.rows), ~(y <= 0))
    return {
        "sums": sums,
        "y": y,
        "dx": dx,
        "dbeta": dbeta,
        "dgamma": dgamma,
        "dr": dy if dresidual is None else dresidual,
    }


def exactly(x: Tensor, dy: Tensor, residual: Tensor | None, weight: Any, bias: Any, relu: bool) -> dict[str, Tensor]:
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias, residual)]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=EPS)
    y = y if residual is None else y + leaves[3]
    kink = y.detach().abs() < 1e-5 if relu else torch.zeros_like(y, dtype=torch.bool)
    y = y.relu() if relu else y
    y.backward(dy.double())
    names = ("dx", "dgamma", "dbeta", "dr")
    gradients = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True) if leaf is not None}
    return {"y": y.detach(), "kink": kink} | gradients


def check(got: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, count: int) -> None:
    rounding = torch.finfo(dtype).eps
    for name in expected.keys() - {"kink"}:
        actual, right = got[name].double(), expected[name]
        where = (
            expected["kink"] if actual.shape == expected["kink"].shape else torch.zeros_like(right, dtype=torch.bool)
        )
        tolerance = 2e-6 * count**0.5 if actual.dim() == 1 else 2e-6 + rounding
        off = ((actual - right).abs() / (1 + right.abs())).masked_fill(where, 0)
        assert actual.isfinite().all(), name
        assert off.max() < tolerance, (name, off.max())


@pytest.mark.parametrize("lay", [Tensor.contiguous, rows], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_each_pass_gives_the_numbers_of_float64(device: str, dealt: str, shape: Any, lay: Lay) -> None:
    number = SHAPES.index(shape) + len(dealt) + (lay is rows)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    x, dy, residual, weight, bias = case(shape, lay, dtype, device, offset=100.0 if dtype == torch.float32 else 2.0)
    for added in ADDED[number % 2 :: 2]:
        of_channels = (weight if number % 4 else None, bias if number % 5 else None)
        given = (x, dy, residual if "residual" in added else None, *of_channels)
        relu = "relu" in added
        check(passes(*given, relu), exactly(*given, relu), dtype, x.numel() // x.shape[1])


@pytest.mark.parametrize("lay", [Tensor.contiguous, rows], ids=["planes", "rows"])
@pytest.mark.parametrize("first", ["as_the_rest", "far"])
def test_sums_keep_the_variance_whatever_the_offset(device: str, dealt: str, lay: Lay, first: str) -> None:
    x = case((6, 3, 8, 9), lay, torch.float32, device, offset=1e4)[0]
    if first == "far":  # what all distances are taken from
        x[0] = 0
    at = gpu.shape(x)
    assert at is not None
    seen = unpack(gpu.sums(x, at))
    values = x.double().transpose(0, 1).flatten(1)
    mean, var = values.mean(1), values.var(1, unbiased=False)
    assert seen.n == values.shape[1]
    assert ((seen.var - var).abs() / var).max() < 5e-6
    assert ((seen.mean - mean).abs() / var.sqrt()).max() < 5e-6


def test_running_statistics_move_as_torchs_do(device: str) -> None:
    mean, var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])
    for n, biased in ((5, False), (5, True), (2, False), (1, False), (0, False)):
        sums = pack(Moments(torch.tensor(float(n)), mean * bool(n), var * bool(n))).to(device)
        running = [torch.full((3,), 10.0, device=device) for _ in range(2)]
        tracked = torch.tensor(7, device=device)
        assert gpu.takes_running(*running, tracked, sums)
        found = gpu.update_running(*running, tracked, sums, 0.25, biased)
        assert all(torch.equal(a, b) for a, b in zip(found, gpu.statistics(sums), strict=True))
        assert tracked == 7 + (n > 0)
        share = 0.25 * (n > 0)
        torch.testing.assert_close(running[0].cpu(), 10 + share * (mean - 10))
        share, bessel = 0.25 * (n > 1), 1 if biased else n / max(n - 1, 1)
        torch.testing.assert_close(running[1].cpu(), 10 + share * (var * bessel - 10))


def test_a_momentum_reaches_the_kernels_with_float64s_digits() -> None:
    for momentum in (0.1, 0.3, 1.0, 0.0, 1e-3):
        parts = torch.tensor(gpu._as_two_float32(momentum), dtype=torch.float64)
        assert abs(parts.float().double().sum().item() - momentum) <= 2**-46 * momentum


def test_torchs_kernels_move_running_statistics_to_the_same_bits(device: str) -> None:
    """A rank whose operations are watched takes them, and its buffers are to stay those of the others."""
    generator = torch.Generator().manual_seed(0)
    channels, n = 2000, torch.tensor(7.0)
    mean, var = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator)
    sums = pack(Moments(n, mean, var)).to(device)
    moved = []
    for name in ("triton", "aten"):
        running = [torch.rand(channels, generator=generator.manual_seed(1)).to(device) for _ in range(2)]
        with road(name, device):
            moving.update(*running, sums, 0.1)
        moved.append(running)
    for by_triton, by_torch in zip(*moved, strict=True):
        assert torch.equal(by_triton, by_torch)


def test_a_nan_stays_one_and_passes_the_relu(device: str) -> None:
    x, dy, residual, weight, bias = case((3, 4, 5, 2), Tensor.contiguous, torch.float32, device, 0.0)
    x[1, 2, 3, 1] = float("nan")
    for lay in (Tensor.contiguous, rows):
        got = passes(lay(x), lay(dy), lay(residual), weight, bias, relu=True)
        assert got["y"][:, 2].isnan().all()
        assert got["dx"][:, 2].isnan().all()
        assert got["dgamma"].isnan().tolist() == [False, False, True, False]
        assert not got["y"][:, [0, 1, 3]].isnan().any()


def test_twice_the_same_is_bitwise_the_same(device: str, dealt: str) -> None:
    for lay in (Tensor.contiguous, rows):
        given = case((9, 3, 4, 5), lay, torch.float32, device, 1.0)
        once, again = (passes(*given, relu=True) for _ in range(2))
        assert all(torch.equal(once[name], again[name]) for name in once)


def test_plans_cover_every_value_once() -> None:
    for rows_, outer, channels, positions in (
        (True, 8193, 70, 1),
        (False, 7, 3, 50176),
        (False, 1, 2048, 49),
        (True, 1, 2, 1),
    ):
        at = triton_tiling.Shape(rows_, outer, channels, positions, 2, processors=132)
        for plan in (triton_tiling.reduction(at), triton_tiling.elementwise(at)):
            per_channel = channels if rows_ else positions
            assert plan.columns == (1 if rows_ else channels) * -(-per_channel // plan.b)
            assert 1 <= plan.splits <= -(-outer // plan.a)
            assert plan.a * plan.b <= 8192
            assert plan.b >= 16  # a byte of bits is never shared


def test_more_values_than_float32_counts_are_counted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiling, "_TILE", 2**20)  # so that the interpreter has few of them
    monkeypatch.setattr(triton_tiling, "_FEW", {True: 2**30, False: 2**30})
    for plan in (triton_tiling.reduction, triton_tiling.elementwise):
        plan.cache_clear()
    if device == "cuda":
        pytest.skip("a tile of that size is for the interpreter")
    x = (torch.randn(16501, 1, generator=torch.Generator().manual_seed(0)) + 1000).expand(16501, 1031).unsqueeze(1)
    x = x.contiguous()
    at = gpu.shape(x)
    assert at is not None
    seen = unpack(gpu.sums(x, at))
    triton_tiling.reduction.cache_clear()
    assert seen.n == 16501 * 1031 > 2**24
    exact = x[:, 0, 0].double().var(unbiased=False)
    torch.testing.assert_close(seen.var[0], exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("lay", [Tensor.contiguous, rows], ids=["planes", "rows"])
@pytest.mark.parametrize("back", ["contiguous", "rows"])
def test_a_hook_may_give_saved_tensors_back_in_another_layout(
    exchanging: None, device: str, lay: Lay, back: str
) -> None:
    layer = syncbn.SyncBatchNorm2d(16, act="relu", device=device)
    gradients = []
    for other in (lambda t: t, rows if back == "rows" else Tensor.contiguous):
        x, dy, residual, *_ = case((2, 16, 3, 3), lay, torch.float32, device, 0.0)
        leaves = [t.requires_grad_() for t in (x, residual)]
        give = lambda t, other=other: other(t) if t.dim() == 4 else t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), give):
            layer(leaves[0], residual=leaves[1]).backward(dy)
        gradients.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
