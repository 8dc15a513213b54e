"""What other implementations get wrong and the tests of our own design would not think of; whose, at each test."""

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.nn.support.oracle import CHANNELS, LAYERS, Step, check, close, make_steps, on_a_rank, one_process
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Ranks

CUTS = pytest.mark.parametrize("cut", [[8], [2, 6], [0, 8]], ids=str)


def compare(ranks: Ranks, layer: nn.Module, steps: list[Step], tolerance: float) -> None:
    check(ranks.run(on_a_rank, layer, steps, world_size=len(steps[0].x)), one_process(layer, steps), tolerance)


# torch.nn.SyncBatchNorm exchanges 1 / sqrt(var + eps) and takes it back: of a variance far below eps 17 % are lost.
@pytest.mark.parametrize("cut", [[400], [10, 390]], ids=str)
def test_a_variance_far_below_eps_keeps_its_digits(ranks: Ranks, cut: list[int]) -> None:
    steps = [Step([1e-5 * x.float() for x in step.x], [d.float() for d in step.dy]) for step in make_steps(cut, (2, 2))]
    layer = syncbn.SyncBatchNorm2d(CHANNELS, eps=1e-3, momentum=1.0)
    expected = one_process(layer, steps)
    for outcome in ranks.run(on_a_rank, layer, steps, world_size=len(cut)):
        torch.testing.assert_close(outcome.running_var.double(), expected.running_var, rtol=1e-5, atol=0)


# apex (#1768), and mmcv by reading: wrong in channels_last where C is no power of two and images are large.
@pytest.mark.parametrize("channels", [17, 31])
def test_large_channels_last_images_with_an_odd_number_of_channels(ranks: Ranks, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(3, channels, 65, 63, generator=generator) for _ in range(2))
    pieces = [
        [piece.contiguous(memory_format=torch.channels_last) for piece in whole.split([1, 2])] for whole in (x, dy)
    ]
    compare(ranks, syncbn.SyncBatchNorm2d(channels), [Step(*pieces)], 1e-4)  # sums of 12,000 values


# detectron2, fairscale: float32 sums of squares; at mean/std = 1000 y is 0.09 off and dx 2.1.
@pytest.mark.parametrize("kind", ["2d", "4d"])
@pytest.mark.parametrize("cut", [[400], [200, 200], [10, 390]], ids=str)
def test_a_large_offset_leaves_outputs_and_gradients_right(ranks: Ranks, cut: list[int], kind: str) -> None:
    steps = make_steps(cut, () if kind == "2d" else (2, 2))
    steps = [Step([(x + 1000).float() for x in step.x], [dy.float() for dy in step.dy]) for step in steps]
    layer = LAYERS[kind](CHANNELS)
    expected = one_process(layer, steps)
    for rank, outcome in enumerate(ranks.run(on_a_rank, layer, steps, world_size=len(cut))):
        close(outcome.y[0], expected.y[0][rank], 5e-4, "y")  # 1000 itself is a float32 to 6e-5
        close(outcome.dx[0], expected.dx[0][rank], 5e-4, "dx")


def untouched(rank: int, world_size: int, layer: nn.Module, step: Step) -> None:
    x, dy = step.x[rank].clone().requires_grad_(), step.dy[rank].clone()
    y = layer(x)
    before = y.detach().clone()
    y.backward(dy)
    assert torch.equal(x, step.x[rank])
    assert torch.equal(dy, step.dy[rank])
    assert torch.equal(y, before)


# detectron2 sums the gradient that it was handed in place; InPlaceABN overwrites its input (inplace_abn#6).
@pytest.mark.parametrize("options", [{}, {"ghost_batch": 2}], ids=str)
def test_input_output_and_incoming_gradient_are_left_as_they_were(ranks: Ranks, options: dict) -> None:
    (step,) = make_steps([3, 5], (4, 3))
    ranks.run(untouched, syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64, **options), step, world_size=2)


# InPlaceABN takes |weight| + eps for the weight; residual networks start with weights of zero.
@CUTS
def test_weights_of_zero_and_below(ranks: Ranks, cut: list[int]) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.0, -1.5, 1e-8]))
    compare(ranks, layer, make_steps(cut, (4, 3)), 1e-10)


# vacancy's divides by sqrt(max(var, eps)).
@CUTS
def test_eps_is_added_to_the_variance(ranks: Ranks, cut: list[int]) -> None:
    steps = [Step([0.1 * x for x in step.x], step.dy) for step in make_steps(cut, (4, 3))]
    compare(ranks, syncbn.SyncBatchNorm2d(CHANNELS, eps=0.01, dtype=torch.float64), steps, 1e-10)


# A sum of squares can leave a variance below zero: NaN in whoever does not clip it (Keras does).
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@CUTS
def test_constant_channels(ranks: Ranks, cut: list[int], dtype: torch.dtype) -> None:
    def constant(x: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.1, 1e4], dtype=dtype).view(-1, 1, 1).expand(x.shape).clone()

    steps = [Step([constant(x) for x in step.x], step.dy) for step in make_steps(cut, (4, 3), dtype=dtype)]
    layer = syncbn.SyncBatchNorm2d(CHANNELS, dtype=dtype)
    expected = one_process(layer, steps)
    for rank, outcome in enumerate(ranks.run(on_a_rank, layer, steps, world_size=len(cut))):
        # 1 / sqrt(eps) = 316 times the rounding of the mean, and of the gradients' sums
        tolerance = 1e-6 if dtype == torch.float64 else 2e-2
        close(outcome.y[0][:, :2], expected.y[0][rank][:, :2], tolerance, "y")
        close(outcome.dx[0], expected.dx[0][rank], tolerance, "dx")
        assert all(value.isfinite().all() for value in (*outcome.y, *outcome.dx, outcome.running_var))
        assert (outcome.running_var >= 0).all()


def half_valid(rank: int, world_size: int, x: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    layer = syncbn.SyncBatchNorm1d(1, momentum=1.0).double()
    layer(x[rank], torch.arange(x.shape[1]) < counts[rank])
    return layer.running_mean, layer.running_var


# flax: with a mask and an axis it averages the ranks' means, whatever they count: 2.76 where 0.53 is right.
def test_a_mask_weighs_ranks_by_what_they_count(ranks: Ranks) -> None:
    counts = [100, 10]
    x = torch.randn(2, 120, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1] += 5
    kept = torch.cat([x[0, :100], x[1, :10]])
    for mean, var in ranks.run(half_valid, x, counts, world_size=2):
        close(mean, kept.mean(0), 1e-10, "running_mean")
        close(var, kept.var(0), 1e-10, "running_var")


def interleaved(rank: int, world_size: int, layers: list[nn.Module], steps: list[Step]) -> list[Tensor]:
    """Both layers forward, then backward in the same order: the second message of one between those of the other."""
    x = [step.x[rank].detach().requires_grad_() for step in steps]
    y = [layer(piece) for layer, piece in zip(layers, x, strict=True)]
    for out, step in zip(y, steps, strict=True):
        out.backward(step.dy[rank])
    return [piece.grad for piece in x]


# Horovod's messages have fixed names: two layers under way at once collide.
def test_two_layers_under_way_at_once_do_not_mix(ranks: Ranks) -> None:
    layers = [parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)) for _ in range(2)]
    steps = make_steps([3, 5], (4, 3), count=2)
    expected = [one_process(layer, [step]).dx[0] for layer, step in zip(layers, steps, strict=True)]
    for rank, gradients in enumerate(ranks.run(interleaved, layers, steps, world_size=2)):
        for number, dx in enumerate(gradients):
            close(dx, expected[number][rank], 1e-10, f"dx of layer {number}")


# InPlaceABN, torchcv#141: one sample on this rank is refused, although the group has more.
@pytest.mark.parametrize("cut", [[1, 3], [1, 1, 1]], ids=str)
def test_one_value_on_a_rank_is_enough_where_the_group_has_more(ranks: Ranks, cut: list[int]) -> None:
    compare(ranks, parameters(syncbn.SyncBatchNorm1d(CHANNELS, dtype=torch.float64)), make_steps(cut, ()), 1e-10)


# fairscale keeps counts in the input's type: infinite above 65504 in float16, though parameters are float32.
def test_more_than_65504_values_of_half_precision_input(ranks: Ranks) -> None:
    steps = make_steps([1, 2], (200, 200), dtype=torch.float16)
    layer = syncbn.SyncBatchNorm2d(CHANNELS)
    expected = one_process(layer, steps)
    for outcome in ranks.run(on_a_rank, layer, steps, world_size=2):
        close(outcome.running_mean, expected.running_mean, 1e-5, "running_mean")
        close(outcome.running_var, expected.running_var, 1e-5, "running_var")
        assert outcome.dx[0].isfinite().all()
