"""However the batch is cut over ranks, the result is that of one process with the whole batch."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.testing import force_exchange
from tests.nn.support.oracle import (
    CHANNELS,
    LAYERS,
    SPATIAL,
    Outcome,
    Step,
    check,
    check_unmoved,
    close,
    each_option,
    make_steps,
    named,
    on_a_rank,
    one_process,
    refused_batch,
)
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Ranks, messages

# Float32 rounds at 6e-8; sums over tens of values, in an order that depends on the cut, and gradients of a few units
# (dgamma adds up a whole batch) bring that to some 1e-6.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CUTS = [[8], [4, 4], [2, 6], [1, 7], [0, 8], [3, 3, 2]]


def compare(ranks: Ranks, layer: nn.Module, steps: list[Step], tolerance: float) -> list[Outcome]:
    outcomes = ranks.run(on_a_rank, layer, steps, world_size=len(steps[0].x))
    check(outcomes, one_process(layer, steps), tolerance)
    return outcomes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cut", CUTS, ids=named)
def test_every_cut_equals_one_process(ranks: Ranks, cut: list[int], kind: str, dtype: torch.dtype) -> None:
    layer = parameters(LAYERS[kind](CHANNELS, dtype=dtype))
    compare(ranks, layer, make_steps(cut, SPATIAL[kind], dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("cut", "sizes"),
    [([4, 4], [(4, 3), (2, 7)]), ([1, 5], [(6, 6), (1, 1)]), ([2, 3, 0], [(1, 1), (3, 5), (4, 4)])],
    ids=["two", "one_pixel", "empty"],
)
def test_unequal_image_sizes_equal_one_process(
    ranks: Ranks, cut: list[int], sizes: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=dtype))
    compare(ranks, layer, make_steps(cut, sizes, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", SPATIAL)
@pytest.mark.parametrize("cut", [[8], [3, 5]], ids=named)
def test_the_layer_without_a_dimension_equals_one_process(ranks: Ranks, cut: list[int], kind: str) -> None:
    compare(ranks, parameters(syncbn.SyncBatchNorm(CHANNELS).double()), make_steps(cut, SPATIAL[kind]), 1e-10)


@pytest.mark.parametrize("cut", [[8], [2, 6], [0, 8], [3, 3, 2]], ids=named)
@each_option(
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"eps": 0.5},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
)
def test_every_option_equals_one_process_over_several_steps(ranks: Ranks, options: dict, cut: list[int]) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64, **options))
    compare(ranks, layer, make_steps(cut, SPATIAL["4d"], count=4), 1e-10)


@pytest.mark.parametrize("cut", [[8], [2, 6], [3, 3, 2]], ids=named)
def test_a_cumulative_average_is_the_mean_over_all_batches(ranks: Ranks, cut: list[int]) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, momentum=None, dtype=torch.float64)
    steps = make_steps(cut, SPATIAL["4d"], count=5)
    batches = [torch.cat(step.x).transpose(0, 1).flatten(1) for step in steps]
    for outcome in ranks.run(on_a_rank, layer, steps, world_size=len(cut)):
        assert outcome.num_batches_tracked == 5
        close(outcome.running_mean, torch.stack([b.mean(1) for b in batches]).mean(0), 1e-12, "running_mean")
        close(outcome.running_var, torch.stack([b.var(1) for b in batches]).mean(0), 1e-12, "running_var")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cut", [[4, 4], [1, 7], [0, 8], [3, 3, 2]], ids=named)
def test_running_buffers_are_bitwise_equal_on_all_ranks_after_many_steps(
    ranks: Ranks, cut: list[int], dtype: torch.dtype
) -> None:
    steps = make_steps(cut, SPATIAL["4d"], count=10, dtype=dtype)
    first, *others = ranks.run(on_a_rank, syncbn.SyncBatchNorm2d(CHANNELS), steps, world_size=len(cut))
    assert not torch.equal(first.running_var, torch.ones(CHANNELS))
    for other in others:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)], ids=str)
@pytest.mark.parametrize("cut", [[8], [2, 6], [0, 8], [3, 3, 2]], ids=named)
def test_half_precision_input_with_float32_parameters(
    ranks: Ranks, cut: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS))
    steps = make_steps(cut, SPATIAL["4d"], dtype=dtype)
    expected = one_process(layer, steps)
    outcomes = ranks.run(on_a_rank, layer, steps, world_size=len(cut))
    check(outcomes, expected, tolerance)
    for outcome in outcomes:
        assert (outcome.y[0].dtype, outcome.dx[0].dtype, outcome.dgamma.dtype) == (dtype, dtype, torch.float32)
        # The input's values are exact numbers; only y and dx are rounded to half precision, never the statistics.
        close(outcome.running_mean, expected.running_mean, 1e-5, "running_mean")
        close(outcome.running_var, expected.running_var, 1e-5, "running_var")


@pytest.mark.parametrize("cut", [[8], [2, 6], [3, 3, 2]], ids=named)
@pytest.mark.parametrize(
    ("kind", "layout"), [("4d", torch.channels_last), ("5d", torch.channels_last_3d)], ids=["4d", "5d"]
)
@pytest.mark.parametrize("same", [True, False], ids=["dy_alike", "dy_contiguous"])
def test_channels_last_in_gives_channels_last_out(
    ranks: Ranks, kind: str, layout: torch.memory_format, cut: list[int], same: bool
) -> None:
    steps = make_steps(cut, SPATIAL[kind], dtype=torch.float32)
    steps = [
        Step(
            [x.contiguous(memory_format=layout) for x in step.x],
            [dy.contiguous(memory_format=layout) if same else dy for dy in step.dy],
        )
        for step in steps
    ]
    for outcome in compare(ranks, parameters(LAYERS[kind](CHANNELS)), steps, 1e-5):
        assert outcome.y[0].is_contiguous(memory_format=layout)
        assert outcome.dx[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("cut", [[8], [2, 6]], ids=named)
def test_strided_inputs_and_gradients_equal_one_process(ranks: Ranks, cut: list[int]) -> None:
    steps = make_steps(cut, SPATIAL["4d"])
    steps = [
        Step(
            [x.transpose(2, 3) for x in step.x],
            [dy[:, :, :1, :1].expand(-1, -1, 3, 4) for dy in step.dy],  # such as sum() and mean() send back
        )
        for step in steps
    ]
    compare(ranks, parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)), steps, 1e-10)


@pytest.mark.parametrize("kind", ["2d", "4d"])
@pytest.mark.parametrize("cut", [[400], [200, 200], [10, 390], [133, 133, 134]], ids=named)
def test_a_large_offset_costs_no_digits_of_the_running_variance(ranks: Ranks, cut: list[int], kind: str) -> None:
    # The mean is 1e3 standard deviations from zero: in float32, sums of squares would leave a variance 19 % off. The
    # ranks' means differ by one standard deviation, so the exchange has to carry them exactly too.
    steps = [
        Step([(x - x.mean() + 1000 + rank).float() for rank, x in enumerate(step.x)], [dy.float() for dy in step.dy])
        for step in make_steps(cut, SPATIAL[kind])
    ]
    layer = LAYERS[kind](CHANNELS, momentum=1.0)
    expected = one_process(layer, steps)
    for outcome in ranks.run(on_a_rank, layer, steps, world_size=len(cut)):
        torch.testing.assert_close(outcome.running_var.double(), expected.running_var, rtol=1e-5, atol=0)
        torch.testing.assert_close(outcome.running_mean.double(), expected.running_mean, rtol=1e-6, atol=0)


def through_the_function(rank: int, world_size: int, steps: list[Step], buffers: list[Tensor]) -> Outcome:
    mean, var, weight, bias = (buffer.clone() for buffer in buffers)
    x = steps[0].x[rank].requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    with force_exchange():
        y = syncbn.sync_batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3, eps=1e-3)
    y.backward(steps[0].dy[rank])
    assert torch.equal(
        syncbn.sync_batch_norm(x, mean, var, weight, bias, training=False),
        F.batch_norm(x, mean, var, weight, bias, training=False),
    )
    return Outcome([y.detach()], [x.grad], weight.grad, bias.grad, mean, var, torch.tensor(1))


@pytest.mark.parametrize("cut", [[8], [2, 6], [0, 8], [3, 3, 2]], ids=named)
def test_the_function_equals_one_process(ranks: Ranks, cut: list[int]) -> None:
    layer = parameters(nn.BatchNorm2d(CHANNELS, momentum=0.3, eps=1e-3, dtype=torch.float64))
    steps = make_steps(cut, SPATIAL["4d"])
    buffers = [layer.running_mean, layer.running_var, layer.weight.detach(), layer.bias.detach()]
    outcomes = ranks.run(through_the_function, steps, buffers, world_size=len(cut))
    check(outcomes, one_process(layer, steps), 1e-10)


def in_eval(rank: int, world_size: int, layer: nn.Module, pieces: list[Tensor]) -> Tensor:
    with force_exchange():
        return layer.eval()(pieces[rank]).detach()


@pytest.mark.parametrize("tracks", [True, False], ids=["running", "no_running_stats"])
def test_eval_is_torchs_on_the_local_batch(ranks: Ranks, tracks: bool) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, track_running_stats=tracks, dtype=torch.float64))
    (step,) = make_steps([3, 5], SPATIAL["4d"])
    local = nn.BatchNorm2d(CHANNELS, track_running_stats=tracks, dtype=torch.float64).eval()
    local.load_state_dict(layer.state_dict())
    for y, piece in zip(ranks.run(in_eval, layer, step.x, world_size=2), step.x, strict=True):
        assert torch.equal(y, local(piece))


def frozen_on_rank_0(rank: int, world_size: int, layer: nn.Module, steps: list[Step]) -> tuple:
    x = steps[0].x[rank].requires_grad_(rank > 0)
    layer.weight.requires_grad_(rank > 0)
    layer(x).backward(steps[0].dy[rank])
    return x.grad, layer.weight.grad, layer.bias.grad


def test_a_rank_that_needs_no_gradient_of_its_input_still_serves_the_others(ranks: Ranks) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    steps = make_steps([3, 5], SPATIAL["4d"])
    expected = one_process(layer, steps)
    frozen, other = ranks.run(frozen_on_rank_0, layer, steps, world_size=2, timeout=20)
    assert frozen[0] is None
    assert frozen[1] is None
    close(other[0], expected.dx[0][1], 1e-10, "dx")
    close(frozen[2] + other[2], expected.dbeta, 1e-10, "dbeta")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_empty_batch_on_all_ranks_moves_nothing(
    ranks: Ranks, kind: str, momentum: float | None, world_size: int
) -> None:
    layer = LAYERS[kind](CHANNELS, momentum=momentum)
    steps = make_steps([0] * world_size, SPATIAL[kind], dtype=torch.float32)
    for outcome in ranks.run(on_a_rank, deepcopy(layer), steps, world_size=world_size):
        assert outcome.y[0].shape == outcome.dx[0].shape == steps[0].x[0].shape
        check_unmoved(outcome, layer)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_batch_of_a_lone_process_moves_nothing(kind: str) -> None:
    layer = LAYERS[kind](CHANNELS)
    layer(torch.zeros(0, CHANNELS, *SPATIAL[kind], requires_grad=True)).sum().backward()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))
    assert torch.equal(layer.running_var, torch.ones(CHANNELS))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_between_two_others_does_not_count(ranks: Ranks, momentum: float | None) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64)
    first, last = make_steps([3, 5], SPATIAL["4d"], count=2)
    (empty,) = make_steps([0, 0], SPATIAL["4d"])
    expected = one_process(layer, [first, last])
    for outcome in ranks.run(on_a_rank, layer, [first, empty, last], world_size=2):
        assert outcome.num_batches_tracked == 2
        close(outcome.running_mean, expected.running_mean, 1e-10, "running_mean")
        close(outcome.running_var, expected.running_var, 1e-10, "running_var")


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    ("kind", "spatial"), [("2d", ()), ("3d", (1,)), ("4d", (1, 1)), ("5d", (1, 1, 1))], ids=list(LAYERS)
)
@pytest.mark.parametrize("cut", [[1], [1, 0], [0, 1], [0, 1, 0]], ids=named)
def test_one_value_per_channel_over_the_group_raises_on_every_rank(
    ranks: Ranks, cut: list[int], kind: str, spatial: tuple[int, ...], momentum: float | None, forced: bool
) -> None:
    (step,) = make_steps(cut, spatial, dtype=torch.float32)
    layer = LAYERS[kind](CHANNELS, momentum=momentum)
    for after in ranks.run(refused_batch, layer, step.x, forced, world_size=len(cut)):
        assert all(value.isfinite().all() for value in after.state_dict().values())
        assert torch.equal(after.running_var, torch.ones(CHANNELS))
        assert torch.equal(after.running_mean, torch.zeros(CHANNELS))


@pytest.mark.parametrize("cut", [[1, 1], [0, 1, 1]], ids=named)
@pytest.mark.parametrize("kind", ["2d", "4d"])
def test_one_sample_on_each_of_two_ranks_works(ranks: Ranks, cut: list[int], kind: str) -> None:
    spatial = [1] * len(SPATIAL[kind])
    compare(ranks, parameters(LAYERS[kind](CHANNELS, dtype=torch.float64)), make_steps(cut, spatial), 1e-10)


def refused_shape(rank: int, world_size: int, layer: nn.Module, x: Tensor) -> int:
    with messages() as sent, force_exchange(), pytest.raises(ValueError, match=r"num_features|expected"):
        layer(x)
    return len(sent)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (syncbn.SyncBatchNorm1d, (4, CHANNELS + 1)),
        (syncbn.SyncBatchNorm2d, (4, CHANNELS + 1, 2, 2)),
        (syncbn.SyncBatchNorm2d, (4, 1, 2, 2)),
        (syncbn.SyncBatchNorm3d, (4, CHANNELS + 1, 2, 2, 2)),
        (syncbn.SyncBatchNorm, (4, CHANNELS + 1)),
        (syncbn.SyncBatchNorm1d, (4, CHANNELS, 2, 2)),
        (syncbn.SyncBatchNorm2d, (4, CHANNELS)),
        (syncbn.SyncBatchNorm3d, (4, CHANNELS, 2, 2)),
        (syncbn.SyncBatchNorm, (CHANNELS,)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "x".join(map(str, value)),
)
def test_a_wrong_shape_is_refused_before_any_message(
    ranks: Ranks, layer: type[nn.Module], shape: tuple[int, ...], affine: bool
) -> None:
    # The other rank would wait for a message that never comes, or gloo abort on one of another size.
    assert ranks.run(refused_shape, layer(CHANNELS, affine=affine), torch.randn(shape), world_size=2) == [0, 0]


def with_a_wrong_shape(rank: int, world_size: int, which: str) -> int:
    arguments = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "weight": None, "bias": None}
    arguments[which] = torch.ones(2)
    refusal = rf"{which} has shape \(2,\), but the input \(4, 3\): 3 channels"
    with messages() as sent, pytest.raises(ValueError, match=refusal):
        syncbn.sync_batch_norm(torch.randn(4, 3), *arguments.values(), training=True)
    return len(sent)


@pytest.mark.parametrize("which", ["running_mean", "running_var", "weight", "bias"])
def test_the_function_refuses_another_number_of_channels_before_any_message(ranks: Ranks, which: str) -> None:
    assert ranks.run(with_a_wrong_shape, which, world_size=2) == [0, 0]
