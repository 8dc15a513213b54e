"""What is masked does not exist: the rest is batch norm over the kept values of all ranks, and nothing else."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.testing import force_exchange
from tests.nn.support.oracle import (
    CHANNELS,
    LAYERS,
    SPATIAL,
    Masks,
    Outcome,
    Step,
    check,
    check_unmoved,
    close,
    each_option,
    make_steps,
    make_twin,
    named,
    on_a_rank,
    refused_batch,
)
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Messages, Ranks, messages

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CUTS = [[8], [3, 5], [0, 8], [3, 3, 2], [4, 0, 4]]


def make_masks(steps: list[Step], blank: int | None = None, keep: float = 0.6) -> Masks:
    """Random masks of full shape; the rank ``blank`` keeps nothing."""
    generator = torch.Generator().manual_seed(3)
    return [
        [
            torch.rand(len(x), *x.shape[2:], generator=generator) < (0 if rank == blank else keep)
            for rank, x in enumerate(step.x)
        ]
        for step in steps
    ]


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """The kept values: ``(n, C)``."""
    values = values.movedim(1, -1)
    mask = torch.tensor(True) if mask is None else mask
    return values[mask.expand(values.shape[:-1])]


def spread(rows: Tensor, like: Tensor, mask: Tensor | None) -> Tensor:
    """The inverse of ``kept``, with zeros where nothing was kept."""
    whole = torch.zeros_like(like.movedim(1, -1), dtype=rows.dtype)
    mask = torch.tensor(True) if mask is None else mask
    whole[mask.expand(whole.shape[:-1])] = rows
    return whole.movedim(-1, 1)


def one_process(layer: nn.Module, steps: list[Step], masks: Masks) -> Outcome:
    """Torch's batch norm in float64 on the kept values of all ranks, and on nothing else."""
    twin = make_twin(layer)
    y, dx = [], []
    for step, mask in zip(steps, masks, strict=True):
        x = [piece.detach().double().requires_grad_() for piece in step.x]
        rows = [kept(*pair) for pair in zip(x, mask, strict=True)]
        out = twin(torch.cat(rows))
        out.backward(torch.cat([kept(dy.double(), m) for dy, m in zip(step.dy, mask, strict=True)]))
        parts = out.detach().split([len(part) for part in rows])
        y.append([spread(*triple) for triple in zip(parts, x, mask, strict=True)])
        dx.append([piece.grad for piece in x])
    gradients = [None if parameter is None else parameter.grad for parameter in (twin.weight, twin.bias)]
    return Outcome(y, dx, *gradients, twin.running_mean, twin.running_var, twin.num_batches_tracked)


def poisoned(steps: list[Step], masks: Masks, value: float) -> list[Step]:
    """The steps with ``value`` in every masked place of ``x`` and of ``dy``."""

    def fill(values: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.tensor(True) if mask is None else mask
        return values.masked_fill(~mask.expand(len(values), *values.shape[2:]).unsqueeze(1), value)

    return [
        Step(*([fill(*pair) for pair in zip(pieces, mask, strict=True)] for pieces in step))
        for step, mask in zip(steps, masks, strict=True)
    ]


def compare(
    ranks: Ranks, layer: nn.Module, steps: list[Step], masks: Masks, tolerance: float, value: float | None = None
) -> list[Outcome]:
    given = steps if value is None else poisoned(steps, masks, value)
    outcomes = ranks.run(on_a_rank, layer, given, masks, world_size=len(steps[0].x))
    check(outcomes, one_process(layer, steps, masks), tolerance)
    return outcomes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cut", CUTS, ids=named)
def test_every_cut_equals_one_process_on_the_kept_values(
    ranks: Ranks, cut: list[int], kind: str, dtype: torch.dtype
) -> None:
    steps = make_steps(cut, SPATIAL[kind], count=2, dtype=dtype)
    compare(ranks, parameters(LAYERS[kind](CHANNELS, dtype=dtype)), steps, make_masks(steps), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", LAYERS)
def test_without_a_process_group_it_is_batch_norm_on_the_kept_values(kind: str) -> None:
    layer = parameters(LAYERS[kind](CHANNELS, dtype=torch.float64))
    steps = make_steps([12], SPATIAL[kind], count=2)
    masks = make_masks(steps)
    expected = one_process(layer, steps, masks)
    check([on_a_rank(0, 1, layer, poisoned(steps, masks, float("nan")), masks, forced=False)], expected, 1e-10)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cut", [[3, 5], [3, 3, 2]], ids=named)
@pytest.mark.parametrize("blank", [0, 1])
def test_a_rank_that_keeps_nothing_equals_one_process(ranks: Ranks, blank: int, cut: list[int], kind: str) -> None:
    steps = make_steps(cut, SPATIAL[kind])
    masks = make_masks(steps, blank)
    assert not masks[0][blank].any()
    compare(ranks, parameters(LAYERS[kind](CHANNELS, dtype=torch.float64)), steps, masks, 1e-10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cut", [[8], [3, 5], [4, 0, 4]], ids=named)
def test_whatever_lies_in_masked_places_does_no_harm(ranks: Ranks, cut: list[int], kind: str, value: float) -> None:
    steps = make_steps(cut, SPATIAL[kind])
    layer = parameters(LAYERS[kind](CHANNELS, dtype=torch.float64))
    outcomes = compare(ranks, layer, steps, make_masks(steps, blank=1), 1e-10, value)
    for outcome, mask in zip(outcomes, make_masks(steps, blank=1)[0], strict=True):
        for result in (outcome.y[0], outcome.dx[0]):  # zero exactly, not nearly
            assert not result.movedim(1, -1)[~mask].any()


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 5, 6), (4, 5, 6), (4, 5, 1), (5, 6), (6,), (1,), ()], ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_mask_broadcasts_to_the_input_less_its_channels(
    ranks: Ranks, world_size: int, shape: tuple[int, ...]
) -> None:
    steps = make_steps([4] * world_size, (5, 6))
    generator = torch.Generator().manual_seed(5)
    masks = [[torch.rand(shape, generator=generator) < 0.5 for _ in range(world_size)]]
    masks[0][0].view(-1)[0] = True
    compare(ranks, parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)), steps, masks, 1e-10)


def test_unequal_image_sizes_equal_one_process(ranks: Ranks) -> None:
    steps = make_steps([3, 2, 4], [(4, 3), (2, 7), (1, 1)])
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    compare(ranks, layer, steps, make_masks(steps), 1e-10)


@pytest.mark.parametrize("world_size", [2, 3])
def test_only_some_ranks_may_have_a_mask(ranks: Ranks, world_size: int) -> None:
    steps = make_steps([3, 5, 2][:world_size], SPATIAL["4d"])
    masks = make_masks(steps)
    masks[0][1] = None
    compare(ranks, parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)), steps, masks, 1e-10)


@each_option({"momentum": None}, {"eps": 0.5}, {"affine": False}, {"bias": False}, {"track_running_stats": False})
@pytest.mark.parametrize("cut", [[8], [2, 6]], ids=named)
def test_every_option_equals_one_process_over_several_steps(ranks: Ranks, cut: list[int], options: dict) -> None:
    steps = make_steps(cut, SPATIAL["4d"], count=3)
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64, **options))
    compare(ranks, layer, steps, make_masks(steps), 1e-10)


@pytest.mark.parametrize("cut", [[8], [2, 6]], ids=named)
def test_a_mask_of_true_alone_is_no_mask(ranks: Ranks, cut: list[int]) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    steps = make_steps(cut, SPATIAL["4d"])
    expected = one_process(layer, steps, [[None] * len(cut)])
    for masks in ([torch.tensor(True)] * len(cut), [None] * len(cut)):
        check(ranks.run(on_a_rank, layer, steps, [masks], world_size=len(cut)), expected, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 5e-3)], ids=str)
def test_half_precision_input_with_a_mask(ranks: Ranks, dtype: torch.dtype, tolerance: float) -> None:
    steps = make_steps([3, 5], SPATIAL["4d"], dtype=dtype)
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS))
    for outcome in compare(ranks, layer, steps, make_masks(steps), tolerance, float("nan")):
        assert (outcome.y[0].dtype, outcome.dx[0].dtype, outcome.dgamma.dtype) == (dtype, dtype, torch.float32)


def test_a_mask_keeps_channels_last(ranks: Ranks) -> None:
    layout = torch.channels_last
    steps = [
        Step(*([piece.contiguous(memory_format=layout) for piece in pieces] for pieces in step))
        for step in make_steps([3, 5], SPATIAL["4d"])
    ]
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    for outcome in compare(ranks, layer, steps, make_masks(steps), 1e-10):
        assert outcome.y[0].is_contiguous(memory_format=layout)
        assert outcome.dx[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("cut", [[400], [200, 200], [10, 390]], ids=named)
def test_a_large_offset_costs_no_digits_of_the_running_variance(ranks: Ranks, cut: list[int]) -> None:
    steps = [
        Step([(x - x.mean() + 1000 + rank).float() for rank, x in enumerate(step.x)], [dy.float() for dy in step.dy])
        for step in make_steps(cut, SPATIAL["4d"])
    ]
    layer = syncbn.SyncBatchNorm2d(CHANNELS, momentum=1.0)
    masks = make_masks(steps)
    expected = one_process(layer, steps, masks)
    for outcome in ranks.run(on_a_rank, layer, poisoned(steps, masks, float("nan")), masks, world_size=len(cut)):
        torch.testing.assert_close(outcome.running_var.double(), expected.running_var, rtol=1e-5, atol=0)
        torch.testing.assert_close(outcome.running_mean.double(), expected.running_mean, rtol=1e-6, atol=0)


def through_the_function(rank: int, world_size: int, step: Step, masks: list[Tensor], buffers: list[Tensor]) -> Outcome:
    mean, var, weight, bias = (buffer.clone() for buffer in buffers)
    x = step.x[rank].requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    y = syncbn.sync_batch_norm(x, mean, var, weight, bias, training=True, momentum=0.3, eps=1e-3, mask=masks[rank])
    y.backward(step.dy[rank])
    return Outcome([y.detach()], [x.grad], weight.grad, bias.grad, mean, var, torch.tensor(1))


@pytest.mark.parametrize("cut", [[8], [2, 6], [0, 8]], ids=named)
def test_the_function_with_a_mask_equals_one_process(ranks: Ranks, cut: list[int]) -> None:
    layer = parameters(nn.BatchNorm2d(CHANNELS, momentum=0.3, eps=1e-3, dtype=torch.float64))
    steps = make_steps(cut, SPATIAL["4d"])
    masks = make_masks(steps)
    buffers = [layer.running_mean, layer.running_var, layer.weight.detach(), layer.bias.detach()]
    (given,) = poisoned(steps, masks, float("nan"))
    outcomes = ranks.run(through_the_function, given, masks[0], buffers, world_size=len(cut))
    check(outcomes, one_process(layer, steps, masks), 1e-10)


def refused(rank: int, world_size: int, layer: nn.Module, mask: Tensor, error: type[Exception]) -> int:
    before = deepcopy(layer.state_dict())
    with messages() as sent, force_exchange():
        for trains in (True, False):
            with pytest.raises(error, match="mask"):
                layer.train(trains)(torch.randn(4, CHANNELS, 5, 6), mask)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    return len(sent)


@pytest.mark.parametrize("ghost_batch", [None, 2])
@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(4, 5, 6), TypeError),
        (torch.ones(4, 5, 6, dtype=torch.uint8), TypeError),
        (torch.ones(4, 5, 6, dtype=torch.int64), TypeError),
        (torch.ones(3, 5, 6, dtype=torch.bool), ValueError),
        (torch.ones(4, dtype=torch.bool), ValueError),
        (torch.ones(4, 1, 5, 6, dtype=torch.bool), ValueError),
        (torch.ones(4, CHANNELS, 5, 6, dtype=torch.bool), ValueError),
    ],
    ids=["float", "uint8", "int64", "samples", "vector", "one_channel", "channels"],
)
def test_a_wrong_mask_is_refused_before_any_message(
    ranks: Ranks, mask: Tensor, error: type[Exception], ghost_batch: int | None
) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=ghost_batch)
    assert ranks.run(refused, layer, mask, error, world_size=2) == [0, 0]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cut", [[8], [3, 5], [0, 8]], ids=named)
def test_all_masked_everywhere_moves_nothing(ranks: Ranks, cut: list[int], kind: str, momentum: float | None) -> None:
    layer = parameters(LAYERS[kind](CHANNELS, momentum=momentum))
    steps = make_steps(cut, SPATIAL[kind], dtype=torch.float32)
    masks = make_masks(steps, keep=0)
    steps = poisoned(steps, masks, float("nan"))
    for rank, outcome in enumerate(ranks.run(on_a_rank, deepcopy(layer), steps, masks, world_size=len(cut))):
        for result in (outcome.y[0], outcome.dx[0]):
            assert torch.equal(result, torch.zeros(steps[0].x[rank].shape))
        check_unmoved(outcome, layer)


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cut", [[8], [3, 5], [5, 0], [3, 3, 2]], ids=named)
def test_one_kept_value_overall_raises_on_every_rank(ranks: Ranks, cut: list[int], kind: str, forced: bool) -> None:
    (step,) = steps = make_steps(cut, SPATIAL[kind], dtype=torch.float32)
    (masks,) = make_masks(steps, keep=0)
    masks[0].view(-1)[2] = True
    for after in ranks.run(refused_batch, LAYERS[kind](CHANNELS), step.x, forced, *masks, world_size=len(cut)):
        assert torch.equal(after.running_var, torch.ones(CHANNELS))
        assert torch.equal(after.running_mean, torch.zeros(CHANNELS))


def test_one_kept_value_on_each_of_two_ranks_works(ranks: Ranks) -> None:
    steps = make_steps([3, 5], SPATIAL["4d"])
    masks = make_masks(steps, keep=0)
    for mask in masks[0]:
        mask.view(-1)[2] = True
    compare(ranks, parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)), steps, masks, 1e-10)


def in_eval(rank: int, world_size: int, layer: nn.Module, steps: list[Step], masks: Masks) -> tuple[Outcome, Messages]:
    with messages() as sent:
        outcome = on_a_rank(rank, world_size, layer.eval(), steps, masks)
    return outcome, sent


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("tracks", [True, False], ids=["running", "no_running_stats"])
@pytest.mark.parametrize("kind", LAYERS)
def test_eval_is_torchs_on_the_local_kept_values(ranks: Ranks, kind: str, tracks: bool, value: float | None) -> None:
    layer = parameters(LAYERS[kind](CHANNELS, track_running_stats=tracks, dtype=torch.float64))
    if tracks:
        layer.running_mean.fill_(0.3)
        layer.running_var.fill_(2.0)
    steps = make_steps([6, 8], SPATIAL[kind])
    masks = make_masks(steps)
    given = steps if value is None else poisoned(steps, masks, value)
    for rank, (outcome, sent) in enumerate(ranks.run(in_eval, layer, given, masks, world_size=2)):
        assert len(sent) == 0
        x, mask = steps[0].x[rank].clone().requires_grad_(), masks[0][rank]
        twin = make_twin(layer).eval()
        out = twin(kept(x, mask))
        out.backward(kept(steps[0].dy[rank], mask))
        close(outcome.y[0], spread(out.detach(), x, mask), 1e-10, "y")
        close(outcome.dx[0], x.grad, 1e-10, "dx")
        close(outcome.dgamma, twin.weight.grad, 1e-10, "dgamma")
        close(outcome.dbeta, twin.bias.grad, 1e-10, "dbeta")
        if tracks:
            assert torch.equal(outcome.running_mean, layer.running_mean)
            assert torch.equal(outcome.running_var, layer.running_var)


def second_derivative(
    rank: int, world_size: int, layer: nn.Module, step: Step, masks: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = step.x[rank].detach().requires_grad_()
    with force_exchange():
        loss = (layer(x, masks[rank]).square() * step.dy[rank]).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        dx.square().sum().backward()
    return dx.detach(), x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("value", [None, float("nan")], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("cut", "blank"), [([8], None), ([3, 5], None), ([3, 5], 0), ([4, 0, 4], None)], ids=str)
def test_a_second_derivative_with_a_mask_equals_one_process(
    ranks: Ranks, cut: list[int], blank: int | None, kind: str, value: float | None
) -> None:
    layer = parameters(LAYERS[kind](CHANNELS, dtype=torch.float64))
    steps = make_steps(cut, SPATIAL[kind])
    masks = make_masks(steps, blank)
    (given,) = steps if value is None else poisoned(steps, masks, value)
    given = given._replace(dy=steps[0].dy)  # a NaN in the loss itself would be nobody's fault but the test's
    results = ranks.run(second_derivative, layer, given, masks[0], world_size=len(cut))

    twin = make_twin(layer)
    x = [piece.clone().requires_grad_() for piece in steps[0].x]
    weights = torch.cat([kept(*pair) for pair in zip(steps[0].dy, masks[0], strict=True)])
    y = twin(torch.cat([kept(*pair) for pair in zip(x, masks[0], strict=True)]))
    dx = torch.autograd.grad((y.square() * weights).sum(), x, create_graph=True)
    sum(piece.square().sum() for piece in dx).backward()
    for rank, (first, second, _, _) in enumerate(results):
        close(first, dx[rank], 1e-10, f"dx, rank {rank}")
        close(second, x[rank].grad, 1e-9, f"second derivative, rank {rank}")
    close(sum(result[2] for result in results), twin.weight.grad, 1e-9, "weight")
    close(sum(result[3] for result in results), twin.bias.grad, 1e-9, "bias")


def one_step(
    rank: int, world_size: int, layer: nn.Module, step: Step, masks: list[Tensor]
) -> tuple[Messages, Messages]:
    x = step.x[rank].requires_grad_()
    with messages() as forward:
        y = layer(x, masks[rank])
    with messages() as backward:
        y.backward(step.dy[rank])
    return forward, backward


@pytest.mark.parametrize("blank", [None, 0])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_mask_adds_no_message(ranks: Ranks, world_size: int, blank: int | None) -> None:
    steps = make_steps([4, 2, 3][:world_size], SPATIAL["4d"])
    masks = make_masks(steps, blank)
    layer = syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)
    for forward, backward in ranks.run(one_step, layer, steps[0], masks[0], world_size=world_size):
        assert forward.payloads == [("all_reduce", [2 * CHANNELS + 2], "double")]
        assert backward.payloads == [("all_reduce", [2 * CHANNELS], "double")]
        assert len(forward) == len(backward) == 1
