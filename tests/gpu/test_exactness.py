"""Whatever the shapes, types, options and layouts: one process in float64, but for rounding, by each road."""

import math
from itertools import cycle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from syncbn.nn.kernels import gpu
from tests.gpu.support.steps import ADDED, ROADS, on_a_rank, prepare, road, run_and_check
from tests.nn.support.cases import Case, cases
from tests.nn.test_properties import PHASES

LARGEST = {"cuda": 10**9, "cpu": 40}  # tiles of a case; the interpreter takes its time

by_each_road = pytest.mark.parametrize("name", ROADS)


def tiles(case: Case) -> int:
    """About how many a pass has."""
    values = sum(n * math.prod(shape) for n, shape in zip(case.samples, case.spatial, strict=True))
    return case.channels * -(-values // 4096)


@by_each_road
def test_any_case_equals_one_process_but_for_rounding(group: None, device: str, name: str, examples: int) -> None:
    def holds(case: Case, added: str) -> None:
        hypothesis.assume(tiles(case) <= LARGEST[device])
        run_and_check(prepare(case, added), device, name)

    drawn = hypothesis.seed(0)(hypothesis.given(cases(1), st.sampled_from(list(ADDED)))(holds))
    hypothesis.settings(max_examples=examples, database=None, deadline=None, print_blob=False, phases=PHASES)(drawn)()


# Channels and positions that fill no block, one of each, a ResNet's first and last; sums in one part and in many.
SHAPES = [
    (3, (7, 7), 8),
    (67, (14, 14), 4),
    (64, (56, 56), 2),
    (130, (31,), 5),
    (2100, (7, 7), 2),
    (2100, (), 3),
    (256, (), 33),
    (1, (1021,), 3),
    (5, (3, 5, 7), 2),
    (2048, (1, 1), 4),
    (1, (), 300),
    (2, (1, 1), 2),
    (2, (71, 73), 2),
]


def covered() -> list[tuple[Case, str]]:
    """Every shape in every layout and type; the rest takes turns."""
    added, masks = cycle(ADDED), cycle([None, "values", None, None, "samples"])
    affine = cycle(
        [(True, True), (True, True), (True, False), (False, False), (True, True), (True, True), (True, False)]
    )
    found = []
    for channels, spatial, samples in SHAPES:
        for layouts in (("contiguous",) * 2, ("channels_last",) * 2, ("channels_last", "contiguous")):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                has_weight, has_bias = next(affine)
                case = Case(
                    (samples,), (spatial,), (False,), channels, dtype, affine=has_weight, bias=has_bias,
                    mask=next(masks), x_layout=layouts[0], dy_layout=layouts[1], offset=1.0, steps=2,
                )  # fmt: skip
                found.append((case, next(added)))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_awkward_sizes_in_every_layout_and_type(group: None, device: str, shape: tuple) -> None:
    chosen = [both for both in covered() if (both[0].channels, both[0].spatial[0], both[0].samples[0]) == shape]
    if tiles(chosen[0][0]) > LARGEST[device]:
        pytest.skip("too much for the interpreter")
    for case, added in chosen:
        training = prepare(case, added)
        for name in ROADS:
            try:
                run_and_check(training, device, name)
            except AssertionError as error:
                raise AssertionError(f"{name}, {added or 'nothing'} added: {error}\n{case}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mask", [None, "values"])
@pytest.mark.parametrize("added", ADDED)
def test_everything_added_in_every_layout_and_type(
    group: None, device: str, added: str, mask: str | None, layout: str, dtype: torch.dtype
) -> None:
    case = Case((3,), ((5, 7),), (False,), 5, dtype, mask=mask, x_layout=layout, dy_layout=layout, offset=1.0, steps=2)
    training = prepare(case, added)
    for name in ROADS:
        run_and_check(training, device, name)


@pytest.mark.parametrize("added", ["", "relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@by_each_road
def test_a_mean_far_from_zero_costs_no_digits(group: None, device: str, name: str, layout: str, added: str) -> None:
    # What float32 drops of the mean is up to 5e-4 standard deviations here; a few values, for their sums to be large.
    run_and_check(prepare(Case((2,), ((1, 3),), (False,), x_layout=layout, offset=1e4, steps=4), added), device, name)


@pytest.mark.parametrize("added", ["relu", "residual", "residual, relu"])
@pytest.mark.parametrize("affine", [True, False])
@by_each_road
def test_an_input_that_needs_no_gradient(group: None, device: str, name: str, affine: bool, added: str) -> None:
    run_and_check(prepare(Case((4,), ((3, 5),), (True,), affine=affine), added), device, name)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("samples", [0, 1], ids=["empty", "one value"])
@by_each_road
def test_no_value_moves_nothing_and_one_is_refused(
    group: None, device: str, name: str, samples: int, momentum: float | None
) -> None:
    for added in ADDED:
        training = prepare(Case((samples,), ((1, 1),), (False,), momentum=momentum, steps=2), added)
        run_and_check(training, device, name)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@by_each_road
def test_running_statistics_over_many_steps(
    group: None, device: str, name: str, parameters: torch.dtype, momentum: float | None
) -> None:
    case = Case((4,), ((3, 3),), (False,), parameters=parameters, momentum=momentum, offset=100.0, steps=6)
    training = prepare(case, "relu")
    run_and_check(training, device, name)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_both_roads_agree(group: None, device: str, layout: str, dtype: torch.dtype, added: str) -> None:
    case = Case((2,), ((6, 5),), (False,), 9, dtype, x_layout=layout, dy_layout=layout, offset=1.0, shift=1.0, steps=2)
    training = prepare(case, added)
    ours, torchs = (on_a_rank(0, 1, training, device, name) for name in ROADS)
    ulp = torch.finfo(dtype).eps
    for one, other in zip(ours, torchs, strict=True):
        for got, expected, tolerance in ((one.values, other.values, ulp), (one.buffers, other.buffers, 0.0)):
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                torch.testing.assert_close(got[key], value, rtol=1e-6 + tolerance, atol=5e-6 + tolerance)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@by_each_road
def test_the_same_twice_bit_by_bit(group: None, device: str, name: str, layout: str, added: str) -> None:
    training = prepare(Case((8,), ((9, 9),), (False,), 5, x_layout=layout, dy_layout=layout), added)
    (first,), (second,) = (on_a_rank(0, 1, training, device, name) for _ in range(2))
    for one, other in ((first.values, second.values), (first.buffers, second.buffers)):
        for key, value in one.items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_these_roads_are_the_ones_that_are_taken(device: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.zeros(2, 3, 4, 4, dtype=dtype, device=device).contiguous(memory_format=layout)
    with road("triton", device):
        assert gpu.shape(x) is not None
        assert gpu.shape(x.double()) is None
    with road("aten", device):
        assert gpu.shape(x) is None
