"""What is right: one process, float64, torch's own batch norm on the whole batch. And the same steps taken on ranks."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.testing import force_exchange

CHANNELS = 3
SPATIAL = {"2d": (), "3d": (5,), "4d": (4, 3), "5d": (2, 3, 2)}  # by the number of dimensions of the input
LAYERS = {
    "2d": syncbn.SyncBatchNorm1d,
    "3d": syncbn.SyncBatchNorm1d,
    "4d": syncbn.SyncBatchNorm2d,
    "5d": syncbn.SyncBatchNorm3d,
}
_DIMENSIONS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


Masks = list[list[Tensor | None]]  # by step and rank


class Step(NamedTuple):
    """One training step: the input and the gradient of the output, a piece a rank."""

    x: list[Tensor]
    dy: list[Tensor]


class Outcome(NamedTuple):
    """What the steps gave. ``y`` and ``dx`` are indexed by step, and by rank too in the oracle's outcome."""

    y: list
    dx: list
    dgamma: Tensor | None
    dbeta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


def make_steps(
    cut: Sequence[int],
    spatial: Sequence[int] | Sequence[Sequence[int]],
    *,
    count: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Step]:
    """Random steps with ``cut[rank]`` samples a rank; ``spatial`` is the same for all ranks, or one shape a rank.

    Channels differ in mean and scale, and so do ranks: no piece is a fair sample of the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = list(spatial) if spatial and isinstance(spatial[0], Sequence) else [spatial] * len(cut)

    def piece(rank: int, samples: int, scaled: bool) -> Tensor:
        x = torch.randn(samples, CHANNELS, *shapes[rank], generator=generator, dtype=torch.float64)
        if scaled:
            per_channel = torch.arange(1.0, CHANNELS + 1, dtype=torch.float64)
            per_channel = per_channel.view(1, CHANNELS, *[1] * len(shapes[rank]))
            x = x * per_channel.sqrt() + per_channel / 2 + 0.3 * rank
        return x.to(dtype)

    return [
        Step([piece(*who, True) for who in enumerate(cut)], [piece(*who, False) for who in enumerate(cut)])
        for _ in range(count)
    ]


def with_parameters(layer: nn.Module) -> nn.Module:
    """The layer with a weight and a bias that are not the neutral ones."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return layer


def one_process(layer: nn.Module, steps: list[Step]) -> Outcome:
    """Trains torch's twin of ``layer`` in float64 on whole batches: the pieces of all ranks, put together."""
    twin: nn.Module | None = None
    y, dx = [], []
    for step in steps:
        x = [piece.detach().double().requires_grad_() for piece in step.x]
        equal = len({piece.shape[1:] for piece in x}) == 1
        whole = (torch.cat if equal else _values)(x)
        dy = (torch.cat if equal else _values)([piece.double() for piece in step.dy])
        twin = twin or make_twin(layer, whole.dim())
        out = twin(whole)
        out.backward(dy)
        y.append(_cut(out.detach(), x))
        dx.append([piece.grad for piece in x])
    assert twin is not None
    gradients = [None if parameter is None else parameter.grad for parameter in (twin.weight, twin.bias)]
    return Outcome(y, dx, *gradients, twin.running_mean, twin.running_var, twin.num_batches_tracked)


def named(cut: list[int]) -> str:
    return "+".join(map(str, cut))


def each_option(*options: dict[str, object]) -> pytest.MarkDecorator:
    """The test once for each of these keywords of a layer."""
    ids = [",".join(f"{name}={value}" for name, value in each.items()) or "default" for each in options]
    return pytest.mark.parametrize("options", options, ids=ids)


def on_a_rank(
    rank: int, world_size: int, layer: nn.Module, steps: list[Step], masks: Masks | None = None, forced: bool = True
) -> Outcome:
    """Trains ``layer`` itself on this rank's pieces. A world of one exchanges too, to run the distributed code."""
    y, dx = [], []
    with force_exchange() if forced else nullcontext():
        for number, step in enumerate(steps):
            x = step.x[rank].detach().requires_grad_()
            out = layer(x) if masks is None else layer(x, masks[number][rank])
            out.backward(step.dy[rank])
            y.append(out.detach())
            dx.append(x.grad)
    gradients = [None if parameter is None else parameter.grad for parameter in (layer.weight, layer.bias)]
    return Outcome(y, dx, *gradients, layer.running_mean, layer.running_var, layer.num_batches_tracked)


def check(outcomes: list[Outcome], expected: Outcome, tolerance: float) -> None:
    """Asserts that the ranks together did what one process does, and that their buffers are bitwise the same."""
    for step, (y, dx) in enumerate(zip(expected.y, expected.dx, strict=True)):
        for rank, outcome in enumerate(outcomes):
            where = f"rank {rank}, step {step}"
            close(outcome.y[step], y[rank], tolerance, f"y, {where}")
            close(outcome.dx[step], dx[rank], tolerance, f"dx, {where}")
    for name in ("dgamma", "dbeta"):
        shares = [getattr(outcome, name) for outcome in outcomes]
        if getattr(expected, name) is None:
            assert shares == [None] * len(outcomes)
        else:
            close(sum(share.double() for share in shares), getattr(expected, name), tolerance, name)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        first, *others = [getattr(outcome, name) for outcome in outcomes]
        if getattr(expected, name) is None:
            assert [first, *others] == [None] * len(outcomes)
        else:
            close(first, getattr(expected, name), tolerance, name)
            assert all(torch.equal(first, other) for other in others), f"{name} differs between ranks"


def check_unmoved(outcome: Outcome, layer: nn.Module) -> None:
    """Asserts that a batch without values has moved nothing."""
    assert torch.equal(outcome.running_mean, layer.running_mean)
    assert torch.equal(outcome.running_var, layer.running_var)
    assert outcome.num_batches_tracked == 0
    assert torch.equal(outcome.dgamma, torch.zeros(CHANNELS))
    assert torch.equal(outcome.dbeta, torch.zeros(CHANNELS))


def refused_batch(
    rank: int, world_size: int, layer: nn.Module, pieces: list[Tensor], forced: bool, *masks: Tensor
) -> nn.Module:
    """The layer after a batch of one value a channel."""
    exchange = force_exchange() if forced else nullcontext()
    with exchange, pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(pieces[rank], *masks[rank : rank + 1])
    return layer


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Asserts closeness, absolute below 1 and relative above, and no NaN."""
    torch.testing.assert_close(
        actual.double(), expected.detach().double(), rtol=tolerance, atol=tolerance,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


def make_twin(layer: nn.Module, dimensions: int = 2) -> nn.Module:
    """Torch's layer in float64, with the parameters and buffers of ``layer``."""
    twin = _DIMENSIONS[dimensions](
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, dtype=torch.float64,
        bias=layer.bias is not None,
    )  # fmt: skip
    twin.load_state_dict(deepcopy(layer.state_dict()))
    return twin


def _values(pieces: list[Tensor]) -> Tensor:
    """``(values, C)``: batch norm does not care which value belongs to which sample or pixel."""
    return torch.cat([piece.movedim(1, -1).reshape(-1, piece.shape[1]) for piece in pieces])


def _cut(whole: Tensor, pieces: list[Tensor]) -> list[Tensor]:
    """``whole`` in pieces again, of the shapes of ``pieces``."""
    if whole.dim() == pieces[0].dim() and whole.shape[1:] == pieces[0].shape[1:]:
        return list(whole.split([len(piece) for piece in pieces]))
    counts = [piece.shape[0] * math.prod(piece.shape[2:]) for piece in pieces]
    return [
        part.view(piece.shape[0], *piece.shape[2:], piece.shape[1]).movedim(-1, 1)
        for part, piece in zip(whole.split(counts), pieces, strict=True)
    ]
