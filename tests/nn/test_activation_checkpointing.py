"""Activation checkpointing runs the layer twice and changes nothing: buffers move once, gradients are the same."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.nn import functional
from syncbn.testing import force_exchange
from tests.nn.support.oracle import CHANNELS, SPATIAL, Step, close, each_option, make_steps
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Messages, Ranks, messages

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
@each_option(*OPTIONS)
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
@pytest.mark.parametrize("make", [partial(Masked, None), partial(Masked, 2), a_net], ids=["mask", "ghost", "no mask"])
@pytest.mark.parametrize("cut", [[8], [3, 5], [0, 8]], ids=str)
def test_with_a_mask_and_an_empty_rank_too(ranks: Ranks, cut: list[int], make: Any, use_reentrant: bool) -> None:
    steps = make_steps(cut, SPATIAL["4d"], count=2)
    for plain, saving in ranks.run(on_a_rank, make(), steps, use_reentrant, world_size=len(cut)):
        assert cut[0] == 0 or all(number == 2 for name, number in plain.items() if "tracked" in name)
        for name in plain:
            close(saving[name], plain[name], 1e-12, name)
            assert "running" not in name or torch.equal(saving[name], plain[name])


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
        assert [shape for _, shape, _ in forward.payloads] == [[2 * CHANNELS + 2]]
        assert [shape for _, shape, _ in backward.payloads] == [[2 * CHANNELS + 2], [2 * CHANNELS]]


def keeping(net: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(net, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)


def with_and_without_contexts(
    rank: int, world_size: int, net: nn.Module, steps: list[Step]
) -> tuple[dict, dict, list[Messages]]:
    again, counted = deepcopy(net), deepcopy(net)
    with force_exchange():
        plain = train(net, net, steps, rank)
        saving = train(again, lambda x: keeping(again, x), steps, rank)
        x = steps[0].x[rank].detach().requires_grad_()
        with messages() as forward:
            y = keeping(counted, x)
        with messages() as backward:
            y.backward(steps[0].dy[rank])
    return plain, saving, [forward, backward]


@pytest.mark.parametrize("cut", [[8], [3, 5], [0, 8], [3, 3, 2]], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_with_our_contexts_the_recomputation_sends_nothing(ranks: Ranks, cut: list[int], masked: bool) -> None:
    net = Masked(None) if masked else a_net()
    widths = [CHANNELS] if masked else [4, CHANNELS]
    steps = make_steps(cut, SPATIAL["4d"], count=3)
    results = ranks.run(with_and_without_contexts, net, steps, world_size=len(cut))
    for plain, saving, (forward, backward) in results:
        assert [shape for _, shape, _ in forward.payloads] == [[2 * width + 2] for width in widths]
        assert [shape for _, shape, _ in backward.payloads] == [[2 * width] for width in reversed(widths)]
        for name in plain:
            if "running" in name or "tracked" in name:
                assert torch.equal(saving[name], plain[name]), name
            else:
                close(saving[name], plain[name], 1e-12, name)


def two_regions(rank: int, world_size: int, net: nn.Module, steps: list[Step]) -> tuple[list[Tensor], int]:
    """Two passes of one network wait for their backward passes, which come in the order of the forward ones."""
    x = [step.x[rank].detach().requires_grad_() for step in steps]
    y = [keeping(net, piece) for piece in x]
    with messages() as sent:
        for out, step in zip(y, steps, strict=True):
            out.backward(step.dy[rank])
    return [piece.grad for piece in x], len(sent)


def test_what_is_kept_of_one_pass_is_not_taken_for_anothers(ranks: Ranks) -> None:
    net, steps = a_net(), make_steps([3, 5], SPATIAL["4d"], count=2)
    one = syncbn.revert(deepcopy(net))
    expected = []
    for step in steps:
        whole = torch.cat(step.x).requires_grad_()
        one(whole).backward(torch.cat(step.dy))
        expected.append(whole.grad.split([3, 5]))
    for rank, (gradients, sent) in enumerate(ranks.run(two_regions, net, steps, world_size=2)):
        assert sent == 4  # a backward message for each layer and pass
        for dx, wanted in zip(gradients, expected, strict=True):
            close(dx, wanted[rank], 1e-10, "dx")


class Activated(nn.BatchNorm2d):
    """A forward pass that counts and calls by itself, as timm's BatchNormAct2d does."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps).relu()


def in_all_kinds_of_layers(rank: int, world_size: int, options: dict, steps: list[Step]) -> tuple[dict, dict]:
    kind = Activated if "activated" in options else nn.BatchNorm2d
    net = nn.Sequential(parameters(nn.Conv2d(CHANNELS, CHANNELS, 1)), parameters(kind(CHANNELS)), nn.Tanh()).double()
    syncbn.convert(net, **{name: value for name, value in options.items() if name != "activated"})
    again = deepcopy(net)
    return train(net, net, steps, rank), train(again, lambda x: keeping(again, x), steps, rank)


@pytest.mark.parametrize("cut", [None, [3, 5], [0, 8]], ids=["lone", "two_ranks", "empty"])
@pytest.mark.parametrize(
    "options", [{}, {"group": 1}, {"ghost_batch": 2}, {"activated": True}, {"activated": True, "group": 1}], ids=str
)
def test_selective_checkpointing_takes_every_kind_of_layer(ranks: Ranks, cut: list[int] | None, options: dict) -> None:
    # It refuses a recomputation that does what the first pass did not.
    steps = make_steps(cut or [8], SPATIAL["4d"], count=2)
    if cut is None:
        results = [in_all_kinds_of_layers(0, 1, options, steps)]
    else:
        results = ranks.run(in_all_kinds_of_layers, options, steps, world_size=2)
    for plain, saving in results:
        for name in plain:
            close(saving[name], plain[name], 1e-12, name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_function_moves_statistics_once_in_one_process_too(use_reentrant: bool) -> None:
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    x = torch.ones(4, CHANNELS, requires_grad=True)

    def normalize(x: Tensor) -> Tensor:
        return syncbn.sync_batch_norm(x, mean, var, training=True, momentum=0.1)

    checkpoint(normalize, x, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(mean, torch.full((CHANNELS,), 0.1))
