"""The compiled passes: the numbers of float64 in every layout, and nothing that they should not touch."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from syncbn.nn import native, statistics
from syncbn.nn.autograd.measure import measure
from syncbn.nn.autograd.normalize import normalize
from syncbn.nn.kernels import cpu, dispatch
from syncbn.nn.kernels import running_statistics as moving
from syncbn.testing import force_exchange, without_native
from tests.nn.support.oracle import Step, check, on_a_rank, one_process
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.compiled import HAS_COMPILER, needs_library
from tests.support.ranks import Ranks

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def turned_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "disabled", False)  # whatever the environment says


def test_the_library_is_there_where_a_compiler_is() -> None:
    assert cpu.built() or not HAS_COMPILER


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    """Channels innermost, whatever the number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"planes": Tensor.contiguous, "rows": channels_last}
SHAPES = [
    (64, 64),  # N, C alone
    (5, 1),
    (2, 3, 1),
    (3, 17, 29),  # an odd number of positions: none fit side by side
    (9, 3, 57, 59),  # few channels, many positions, some of them left over
    (2, 130, 7, 7),
    (4, 2100, 3, 5),  # wider than a row is made
    (16, 24, 33, 31),  # enough for threads
    (2, 5, 4, 3, 6),
]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def step(x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-3) -> list[Tensor]:
    """The layer's numbers: y, dx, dbeta, dgamma, as the compiled road gives them, and no other."""
    local = dispatch.local_sums(x)
    assert local.at is not None
    found = dispatch.rounded(local.sums, x, local)
    y, _ = dispatch.normalize(x, found, weight, bias, eps, local)
    data = dispatch.pair(x, dy, None, found, weight, eps)
    assert data.at is not None
    sums, dbias, dweight = dispatch.gradient_sums(data, found, weight, eps)
    dx, _ = dispatch.input_gradient(data, local.sums[0], found, weight, sums, eps)
    return [y, dx, dbias, dweight]


def exactly(x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-3) -> list[Tensor]:
    """The same by torch, in float64."""
    gamma, beta = (None if t is None else t.double() for t in (weight, bias))
    gamma = torch.ones(x.shape[1], dtype=torch.float64) if gamma is None else gamma
    beta = torch.zeros_like(gamma) if beta is None else beta
    leaves = [t.detach().clone().requires_grad_() for t in (x.double(), gamma, beta)]
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], training=True, eps=eps)
    y.backward(dy.double())
    dx, dgamma, dbeta = (leaf.grad for leaf in leaves)
    return [y.detach(), dx, dbeta, dgamma]


def compare(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for what, actual, right in zip(("y", "dx", "dbias", "dweight"), got, expected, strict=True):
        off = (actual.double() - right).abs().max() / right.abs().max().clamp_min(1)
        assert off <= tolerance, f"{what} is off by {off:.2g}"


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(shape: tuple[int, ...], layouts: tuple[str, str], affine: bool, threads: int) -> None:
    x, dy = (LAYOUTS[layout](normal(*shape, seed=seed)) for seed, layout in enumerate(layouts))
    x = x + torch.arange(shape[1]).view([1, -1] + [1] * (len(shape) - 2)) % 7  # each channel has its own
    weight, bias = (normal(shape[1], seed=3), normal(shape[1], seed=4)) if affine else (None, None)
    got = step(x, dy, weight, bias)
    compare(got, exactly(x, dy, weight, bias), 5e-6)
    torchs = F.batch_norm(x, torch.zeros(shape[1]), torch.ones(shape[1]))
    assert got[0].stride() == got[1].stride() == torchs.stride()


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_computed_in_float32(shape: tuple[int, ...], layout: str) -> None:
    x, dy = (LAYOUTS[layout](normal(*shape, seed=seed) + 1).bfloat16() for seed in (0, 1))
    weight, bias = normal(shape[1], seed=3), normal(shape[1], seed=4)
    got = step(x, dy, weight, bias)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    expected = exactly(x, dy, weight, bias)
    compare(got[:2] + got[2:], expected, 2**-8)  # a rounding to 8 bits
    compare([expected[0], expected[1], *got[2:]], expected, 5e-6)


@needs_library
def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    """Every bfloat16 there is, and products between two of them."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).reshape(-1, 1)
    neutral = torch.tensor([[0.0], [1.0], [0.0]])
    for factor in (1.0, 1 + 2**-8, 1 + 2**-9, 1.3):
        weight = torch.tensor([factor])
        y, _ = dispatch.normalize(x, neutral, weight, None, 0.0, dispatch.Local(x, cpu.shape(x)))
        expected = (x.float() * weight).bfloat16()
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    all_bits = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # rounded up it would be -0
    assert dispatch.normalize(x, neutral, all_bits, None, 0.0, dispatch.Local(x, cpu.shape(x)))[0].isnan().all()


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_an_offset_costs_nothing(offset: float, layout: str) -> None:
    x, dy = (LAYOUTS[layout](normal(8, 5, 30, 30, seed=seed) + shift) for seed, shift in ((0, offset), (1, 0.0)))
    seen = statistics.unpack(dispatch.sums_of(cpu.sums(x, cpu.shape(x))))
    var = x.double().var((0, 2, 3), correction=0)
    assert ((seen.var - var).abs() / var).max() < 1e-6  # one pass in float32 would have no digit left at 1e4
    compare(step(x, dy, None, None), exactly(x - offset, dy, None, None), 1e-5)


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e25, 1e-15])
def test_squares_beyond_float32(scale: float, layout: str) -> None:
    x = LAYOUTS[layout](normal(8, 5, 30, 30, seed=0) * scale)
    seen = statistics.unpack(dispatch.sums_of(cpu.sums(x, cpu.shape(x))))
    torch.testing.assert_close(seen.var, x.double().var((0, 2, 3), correction=0), rtol=1e-9, atol=0)


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_channel(bad: float, layout: str) -> None:
    x, dy = (LAYOUTS[layout](normal(4, 5, 3, 3, seed=seed)) for seed in (0, 1))
    x[1, 2, 0, 0] = bad
    for t in step(x, dy, None, None)[:2]:
        assert t[:, 2].isnan().any()
        assert t[:, [0, 1, 3, 4]].isfinite().all()


@needs_library
def test_running_statistics_are_torchs() -> None:
    x = normal(6, 5, 4, seed=0) * 3 + 1
    for momentum in (0.0, 0.1, 1.0):
        for biased in (False, True):
            ours, torchs = ([normal(5, seed=1), normal(5, seed=2).abs()] for _ in range(2))
            sums = dispatch.local_sums(x).sums
            counts = torch.tensor([4, 4]).unbind()
            assert cpu.takes_running(*ours, counts[0], sums)
            found = cpu.update_running(*ours, counts[0], sums, momentum, biased)
            with without_native():
                assert moving.update(*torchs, sums, momentum, biased, counts[1]) is None
            torch.testing.assert_close(ours, torchs, rtol=2e-7, atol=1e-7)
            assert counts[0] == counts[1] == 5
            assert torch.equal(found, cpu.statistics(sums))


@needs_library
@pytest.mark.parametrize(("n", "mean", "var"), [(0, 5.0, 7.0), (1, 5.5, 7.0), (2, 5.5, 7.2)])
def test_no_value_moves_nothing_and_one_has_no_variance(n: int, mean: float, var: float) -> None:
    sums = torch.tensor([n, n * 10, n * (100 + 4.5)], dtype=torch.float64)  # mean 10, variance 4.5, unbiased 9
    running, tracked = [torch.tensor([5.0]), torch.tensor([7.0])], torch.tensor(0)
    cpu.update_running(*running, tracked, sums, 0.1)
    torch.testing.assert_close(running, [torch.tensor([mean]), torch.tensor([var])])
    assert tracked == min(n, 1)


@needs_library
def test_autograd_notices_that_running_statistics_moved() -> None:
    """As for any change in place: what evaluation saved for its backward pass is no longer there."""
    running = [torch.zeros(3), torch.ones(3)]
    x = normal(4, 3, seed=0).requires_grad_()
    y = F.batch_norm(x, *running)
    cpu.update_running(*running, None, dispatch.local_sums(normal(4, 3, seed=1)).sums, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_rank_compiled_and_one_not(ranks: Ranks) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(33))
    steps = [Step([normal(n, 33, 9, 9, seed=n) + n for n in (3, 5)], [normal(n, 33, 9, 9, seed=-n) for n in (3, 5)])]
    check(ranks.run(mixed, layer, steps, world_size=2), one_process(layer, steps), 1e-5)


def mixed(rank: int, world_size: int, layer: nn.Module, steps: list[Step]) -> object:
    if rank:
        with without_native():
            return on_a_rank(rank, world_size, layer, steps)
    return on_a_rank(rank, world_size, layer, steps)


class Watched(Tensor):
    """A subclass, whose operations somebody may have redefined."""


class Watching(TorchDispatchMode):
    """Sees every operation of torch's, and would not see compiled code."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@needs_library
def test_what_is_taken() -> None:
    x = normal(4, 6, 5, 5, seed=0)
    taken = [x, nn.Parameter(x), x.bfloat16(), channels_last(x), x[1:3], x.transpose(0, 0), normal(6, 4, seed=1)]
    for t in taken:
        assert cpu.shape(t) is not None
    odd = [x.double(), x.half(), x[:, 1:4], x.transpose(2, 3), x[:0], x.as_subclass(Watched), torch._neg_view(x)]
    odd += [x.to("meta"), x[:1].expand(4, 6, 5, 5), x.transpose(0, 1)]
    for t in odd:
        assert cpu.shape(t) is None
    with Watching():
        assert cpu.shape(x) is None
    with without_native():
        assert cpu.shape(x) is None
    assert cpu.shape(x) is not None


def forward_backward(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Through the public function; running statistics and gradients included."""
    leaves = [t.detach().requires_grad_() for t in (x.clone(), weight, bias)]  # parameters as they lie in memory
    running = [torch.zeros(x.shape[1], dtype=torch.float32, device="cpu") for _ in range(2)]
    with force_exchange():
        batch = measure(leaves[0], None)
        moving.update(*running, batch.sums, 0.1)
        y = normalize(batch, *leaves[1:], 1e-3)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves), *running]


def odd_parameters() -> dict[str, tuple[Tensor, Tensor]]:
    weight, bias = normal(6, seed=2), normal(6, seed=3)
    return {
        "float64": (weight.double(), bias.double()),
        "bfloat16": (weight.bfloat16(), bias.bfloat16()),
        "strided": (torch.stack([weight, bias])[0], normal(12, seed=4)[::2]),
        "expanded": (torch.tensor(2.0).expand(6), torch.tensor(3.0).expand(6)),
        "two types": (weight.double(), bias),
    }


@pytest.mark.parametrize("which", odd_parameters())
def test_parameters_of_any_type_and_stride(which: str) -> None:
    x, dy = normal(4, 6, 5, 5, seed=0), normal(4, 6, 5, 5, seed=1)
    weight, bias = odd_parameters()[which]
    got = forward_backward(x, dy, weight, bias)
    with without_native():
        expected = forward_backward(x, dy, weight, bias)
    for actual, right in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)  # types too


@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_defaults_of_torch_change_nothing(setting: str) -> None:
    arguments = [normal(4, 6, 5, 5, seed=0), normal(4, 6, 5, 5, seed=1), normal(6, seed=2), normal(6, seed=3)]
    expected = forward_backward(*arguments)
    if setting == "dtype":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    try:
        got = forward_backward(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for actual, right in zip(got, expected, strict=True):
        assert torch.equal(actual, right)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_stride_and_sign(layout: str) -> None:
    x = LAYOUTS[layout](normal(4, 6, 5, 5, seed=0))
    weight, bias = normal(6, seed=2), normal(6, seed=3)
    odd = [
        torch.tensor(1.5).expand(4, 6, 5, 5),
        normal(4, 6, 5, 5, seed=1).transpose(2, 3),
        normal(8, 6, 5, 5, seed=1)[::2],
        torch._neg_view(normal(4, 6, 5, 5, seed=1)),
    ]
    for dy in odd:
        _, dx, dweight, dbias, *_ = forward_backward(x, dy, weight, bias)
        exact = exactly(x, dy.clone(), weight, bias)
        compare([exact[0], dx, dbias, dweight], exact, 1e-5)


def test_an_environment_variable_turns_it_off() -> None:
    code = "import torch; from syncbn.nn.kernels import cpu; print(cpu.shape(torch.zeros(2, 3)))"
    for value, expected in (("0", True), ("1", not cpu.built())):
        environment = os.environ | {"SYNCBN_NATIVE": value}
        said = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, encoding="utf-8"
        )
        assert (said.stdout == "None\n") == expected


@pytest.mark.parametrize("which", ["running_mean", "running_var", "weight", "bias"])
def test_memory_of_another_size_is_left_alone(ranks: Ranks, which: str) -> None:
    """As after a pruning that forgot one of them."""
    ranks.run(forgotten, which, world_size=1)


def forgotten(rank: int, world_size: int, which: str) -> None:
    layer, memory = syncbn.SyncBatchNorm1d(64), torch.arange(100.0)
    setattr(layer, which, memory[:3] if which.startswith("running") else nn.Parameter(memory[:3]))
    refusal = rf"layer SyncBatchNorm1d\(64\): {which} has shape \(3,\), but the input \(8, 64\): 64 channels"
    with force_exchange(), pytest.raises(ValueError, match=refusal):
        layer(normal(8, 64, seed=0)).sum().backward()
    assert torch.equal(memory[3:], torch.arange(3.0, 100.0))


def test_a_weight_for_all_channels_is_broadcast() -> None:
    x = normal(4, 6, 5, 5, seed=0)
    local = dispatch.local_sums(x)
    got, _ = dispatch.normalize(x, dispatch.rounded(local.sums, x, local), torch.ones(1), None, 0.1, local)
    torch.testing.assert_close(got, F.batch_norm(x, None, None, training=True, eps=0.1), rtol=1e-5, atol=1e-5)


@needs_library
def test_only_plain_memory_of_the_cpu_is_written_to() -> None:
    running, sums = [torch.zeros(3), torch.ones(3)], torch.ones(7, dtype=torch.float64)
    tracked = torch.tensor(0)
    assert cpu.takes_running(*running, tracked, sums)
    assert cpu.takes_running(*running, None, sums)
    assert not cpu.takes_running(*running, tracked, sums.to("meta"))
    assert not cpu.takes_running(*running, tracked, torch.ones(9, dtype=torch.float64))
    assert not cpu.takes_running(*running, tracked.int(), sums)
    assert not cpu.takes_running(*running, torch.tensor([0, 0]), sums)
    assert not cpu.takes(torch._efficientzerotensor(3))  # has no memory


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the build needs of the project, elsewhere."""
    for name in ("hatch_build.py", *(str(path.relative_to(ROOT)) for path in native.SOURCES)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


BUILD = "import pathlib, hatch_build; print(hatch_build.build(pathlib.Path()))"


@needs_library
@pytest.mark.parametrize("compiler", [None, "-no-openmp", "false", "/there/is/none"])
def test_the_build_makes_do_with_what_there_is(
    copy: Path, compiler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hatchling is there while packages are built only: the hook's base class stands in for it."""
    library = copy / "syncbn/nn/kernels/libcpu.so"
    library.write_text("of another machine", encoding="utf-8")
    stub = copy / "hatchling/builders/hooks/plugin/interface.py"
    stub.parent.mkdir(parents=True)
    stub.write_text("BuildHookInterface = object\n", encoding="utf-8")
    if compiler == "-no-openmp":
        script = copy / "cc"
        script.write_text('#!/bin/sh\ncase "$*" in *-fopenmp\\ *) exit 1;; esac\nexec gcc "$@"\n', encoding="utf-8")
        script.chmod(0o755)
        compiler = str(script)
    if compiler is not None:
        monkeypatch.setenv("CC", compiler)
    said = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout
    works = compiler is None or compiler.endswith("cc")
    assert said == f"{works}\n"
    assert library.exists() == works
    assert {path.name for path in library.parent.iterdir()} - {"libcpu.so"} == {path.name for path in native.SOURCES}


@needs_library
def test_a_library_from_other_sources_is_not_taken(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SOURCES", [copy / "syncbn/nn/kernels" / path.name for path in native.SOURCES])
    assert native.load()
    with (copy / "syncbn/nn/kernels/cpu.c").open("a", encoding="utf-8") as source:
        source.write("// changed\n")
    assert not native.load()
    monkeypatch.setattr(native, "LIBRARY", copy / "none.so")
    assert not native.load()
