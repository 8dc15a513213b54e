"""Activation checkpointing runs the layer twice and changes nothing: buffers move once, gradients are the same."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.nn import functional
from syncbn.testing import force_exchange
from tests.harness import Messages, Ranks, messages
from tests.nn.oracle import CHANNELS, SPATIAL, Step, close, make_steps
from tests.nn.oracle import with_parameters as parameters

REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
WORLDS = pytest.mark.parametrize("cut", [None, [8], [3, 5]], ids=["lone", "forced", "two_ranks"])
OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"biased_running_var": True},
    {"ghost_batch": 2},
]


def a_net(**options: object) -> nn.Module:
    return nn.Sequential(
        parameters(nn.Conv2d(CHANNELS, 4, 1)),
        parameters(syncbn.SyncBatchNorm2d(4, **options)),
        nn.Tanh(),
        parameters(nn.Conv2d(4, CHANNELS, 1)),
        parameters(syncbn.SyncBatchNorm2d(CHANNELS, **options)),
    ).double()


def train(net: nn.Module, forward: Callable[[Tensor], Tensor], steps: list[Step], rank: int) -> dict[str, Tensor]:
    results = {}
    for number, step in enumerate(steps):
        x = step.x[rank].detach().requires_grad_()
        y = forward(x)
        y.backward(step.dy[rank])
        results |= {f"y{number}": y.detach(), f"dx{number}": x.grad}
    results |= {f"{name}.grad": parameter.grad for name, parameter in net.named_parameters()}
    return results | {name: buffer.clone() for name, buffer in net.named_buffers()}


def on_a_rank(
    rank: int, world_size: int, net: nn.Module, steps: list[Step], use_reentrant: bool, forced: bool = True
) -> tuple[dict, dict]:
    """The results without and with checkpointing."""
    again = deepcopy(net)
    with force_exchange() if forced else nullcontext():
        plain = train(net, net, steps, rank)
        saving = train(again, lambda x: checkpoint(again, x, use_reentrant=use_reentrant), steps, rank)
    return plain, saving


@REENTRANT
@WORLDS
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: ",".join(f"{name}={value}" for name, value in o.items()) or "default"
)
def test_buffers_move_once_and_all_equals_the_run_without(
    ranks: Ranks, cut: list[int] | None, options: dict, use_reentrant: bool
) -> None:
    steps = make_steps(cut or [8], SPATIAL["4d"], count=3)
    net = a_net(**options)
    if cut is None:
        results = [on_a_rank(0, 1, net, steps, use_reentrant, forced=False)]
    else:
        results = ranks.run(on_a_rank, net, steps, use_reentrant, world_size=len(cut))
    for plain, saving in results:
        assert plain.keys() == saving.keys()
        assert options.get("track_running_stats") is False or plain["1.num_batches_tracked"] == 3
        for name in plain:
            if "running" in name or "tracked" in name:
                assert torch.equal(saving[name], plain[name]), name
            else:
                close(saving[name], plain[name], 1e-12, name)


class Masked(nn.Module):
    """A layer whose mask comes from the data."""

    def __init__(self, ghost_batch: int | None) -> None:
        super().__init__()
        self.layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=ghost_batch, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[:, 0] > 0.5)


@REENTRANT
@pytest.mark.parametrize("ghost_batch", [None, 2])
@pytest.mark.parametrize("cut", [[8], [3, 5]], ids=str)
def test_with_a_mask_too(ranks: Ranks, cut: list[int], ghost_batch: int | None, use_reentrant: bool) -> None:
    steps = make_steps(cut, SPATIAL["4d"], count=2)
    for plain, saving in ranks.run(on_a_rank, Masked(ghost_batch), steps, use_reentrant, world_size=len(cut)):
        assert plain["layer.num_batches_tracked"] == 2
        for name in plain:
            close(saving[name], plain[name], 1e-12, name)
            assert "running" not in name or torch.equal(saving[name], plain[name])


@REENTRANT
def test_an_empty_rank_moves_with_the_others(ranks: Ranks, use_reentrant: bool) -> None:
    steps = make_steps([0, 8], SPATIAL["4d"], count=2)
    for plain, saving in ranks.run(on_a_rank, a_net(), steps, use_reentrant, world_size=2):
        for name in plain:
            close(saving[name], plain[name], 1e-12, name)


class Asks(nn.Module):
    """Notes what ``recomputing`` says each time it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[bool] = []
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.answers.append(functional.recomputing())
        return (x * self.weight).exp()


def test_an_ordinary_pass_recomputes_nothing() -> None:
    asks = Asks()
    assert not functional.recomputing()
    asks(torch.randn(3)).sum().backward()
    with torch.no_grad():
        asks(torch.randn(3))
    assert asks.answers == [False, False]
    assert not functional.recomputing()


@REENTRANT
def test_recomputing_is_told_from_a_first_pass(use_reentrant: bool) -> None:
    asks = Asks()
    x = torch.randn(3, requires_grad=True)
    for _ in range(2):
        checkpoint(asks, x, use_reentrant=use_reentrant).sum().backward()
    assert asks.answers == [False, True] * 2
    assert not functional.recomputing()


@REENTRANT
def test_recomputing_is_told_within_nested_checkpoints(use_reentrant: bool) -> None:
    asks = Asks()
    x = torch.randn(3, requires_grad=True)

    def inner(x: Tensor) -> Tensor:
        return checkpoint(asks, x, use_reentrant=use_reentrant)

    checkpoint(inner, x, use_reentrant=use_reentrant).sum().backward()
    first, *others = asks.answers
    assert not first
    assert others
    assert all(others)


def two_passes(rank: int, world_size: int, net: nn.Module, step: Step, use_reentrant: bool) -> list[Messages]:
    x = step.x[rank].requires_grad_()
    with messages() as forward:
        y = checkpoint(net, x, use_reentrant=use_reentrant)
    with messages() as backward:
        y.backward(step.dy[rank])
    return [forward, backward]


@REENTRANT
def test_the_second_pass_sends_again_and_no_more(ranks: Ranks, use_reentrant: bool) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)
    (step,) = make_steps([3, 5], SPATIAL["4d"])
    for forward, backward in ranks.run(two_passes, layer, step, use_reentrant, world_size=2):
        assert [shape for _, shape, _ in forward.payloads] == [[2 * CHANNELS + 1]]
        assert [shape for _, shape, _ in backward.payloads] == [[2 * CHANNELS + 1], [2 * CHANNELS]]
