"""One training of the layer on a device, by each of its roads, against one process in float64.

As in :mod:`tests.nn.test_properties`, with an activation and a residual; no more than rounding is allowed.
"""

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from syncbn.testing import force_exchange, interpreted, without_gpu, without_native
from tests.nn.support.cases import Case, Piece, lay_out, make_layer, make_piece
from tests.nn.support.exactness import TERMS, Near, OneProcess, computing, kept, rounding
from tests.nn.test_properties import Step, assert_near, check_shares, check_values, copies

ROADS = ("triton", "aten")
ADDED = {"": (None, False), "relu": ("relu", False), "residual": (None, True), "residual, relu": ("relu", True)}


def road(name: str, device: str) -> AbstractContextManager[None]:
    """Within it the layer's passes are Triton's kernels, interpreted on the CPU; or torch's own."""
    if name == "triton":
        return interpreted() if device == "cpu" else nullcontext()
    return without_native() if device == "cpu" else without_gpu()


def on(device: str, t: Tensor) -> Tensor:
    """``t`` there, in the very same strides."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return memory.to(device).as_strided(t.size(), t.stride(), t.storage_offset())


class Given(NamedTuple):
    """What one rank gets in one step."""

    piece: Piece
    residual: Tensor | None


class Training(NamedTuple):
    """A case, what is added to the batch norm, and what each rank gets in each step.

    ``cut``: data are not rounded to their type but cut off, which may be off by twice as much.
    """

    case: Case
    act: str | None
    steps: list[list[Given]]
    cut: bool = False


def prepare(case: Case, added: str) -> Training:
    """Gradients are zero where rounding decides whether the activation lets them through."""
    act, residual = ADDED[added]
    if act and case.dy_layout == "expanded":
        case = replace(case, dy_layout="contiguous")
    steps = []
    for number in range(case.steps):
        pieces = [make_piece(case, number, rank) for rank in range(len(case.samples))]
        given = [Given(piece, _residual(case, piece, rank) if residual else None) for rank, piece in enumerate(pieces)]
        if act and sum(_counts(given)) > 1:
            z = _sum(OneProcess(case).step(*_rows(given))["y"], given, case)
            for (piece, _), decided in zip(given, (z.value.abs() > z.bound).split(_counts(given)), strict=True):
                _values(piece.dy, piece.mask, ~decided)
        steps.append(given)
    return Training(case, act, steps)


def on_a_rank(rank: int, world_size: int, training: Training, device: str, name: str) -> list[Step]:
    layer = make_layer(training.case).to(device)
    with force_exchange(), road(name, device):
        return [one_step(layer, training, given[rank], training.case.frozen[rank], device) for given in training.steps]


def one_step(layer: nn.Module, training: Training, given: Given, frozen: bool, device: str) -> Step:
    values: dict[str, Tensor] = {}
    x, dy, mask, residual = (None if t is None else on(device, t) for t in (*given.piece, given.residual))
    for name, leaf in (("dx", None if frozen else x), ("dresidual", residual)):
        if leaf is not None:
            leaf.requires_grad_().register_hook(lambda d, name=name: values.update({name: d}))
    layer.zero_grad()
    autocast = torch.autocast(device, torch.bfloat16) if training.case.autocast else nullcontext()
    try:
        with autocast:
            y = layer(x, mask, residual=residual, act=training.act)
    except ValueError as error:
        assert "Expected more than 1 value per channel when training" in str(error)  # noqa: PT017
        return _back(layer, None)
    needed = not frozen or residual is not None or any(p.requires_grad for p in layer.parameters())
    assert y.requires_grad or not needed
    if y.requires_grad:  # not where everything is frozen
        y.backward(dy)
    values["y"] = y.detach()
    values |= {"dgamma" if name == "weight" else "dbeta": p.grad for name, p in layer.named_parameters()}
    return _back(layer, values)


def run_and_check(training: Training, device: str, name: str) -> None:
    """On this process alone."""
    check(training, [on_a_rank(0, 1, training, device, name)], device, name)


def check(training: Training, results: list[list[Step]], device: str, name: str) -> None:
    """Asserts that all ranks together did what one process does, and that their buffers are bitwise the same."""
    # Triton's interpreter cuts bfloat16 off where it should round.
    training = training._replace(cut=training.case.dtype == torch.bfloat16 and (device, name) == ("cpu", "triton"))
    oracle = OneProcess(training.case)
    for number, (given, steps) in enumerate(zip(training.steps, zip(*results, strict=True), strict=True)):
        if device == "cuda" and training.case.mask is not None and sum(_counts(given)) == 1:
            return  # nobody looks, for each full batch would wait too: what comes of it is nothing to compare with
        check_step(training, oracle, given, list(steps), f"step {number}")


def check_step(training: Training, oracle: OneProcess, given: list[Given], steps: list[Step], where: str) -> None:
    case, counts = training.case, _counts(given)
    refused = [step.values is None for step in steps]
    assert refused == [sum(counts) == 1] * len(steps), f"{where}, {counts} values a rank: {refused} were refused"
    if sum(counts) != 1:
        for name, near in _expected(training, oracle, given).items():
            got = [step.values.get(name) for step in steps if step.values is not None]
            if name in ("dgamma", "dbeta"):
                check_shares(got, near, case.parameters, f"{where}, {name}")
                continue
            nears = map(Near, near.value.split(counts), near.bound.split(counts))
            for rank, (actual, (piece, residual), part) in enumerate(zip(got, given, nears, strict=True)):
                what = f"{where}, rank {rank}, {name}"
                if name == "dx" and case.frozen[rank]:
                    assert actual is None, what
                elif name != "dresidual":
                    check_values(actual, piece, part, what)
                else:
                    assert actual.dtype == residual.dtype, what
                    assert_near(kept(actual, piece.mask), part, what)
                    assert piece.mask is None or not kept(actual, ~piece.mask).any(), f"{what}, where masked"
    for name, near in oracle.buffers().items():
        first, *others = [step.buffers[name] for step in steps]
        assert_near(first, near, f"{where}, {name}")
        assert all(torch.equal(first, other) for other in others), f"{where}, {name} differs between ranks"


def _expected(training: Training, oracle: OneProcess, given: list[Given]) -> dict[str, Near]:
    x, dy = _rows(given)
    if training.act and len(x):
        z = _sum(copy.deepcopy(oracle).step(x, dy)["y"], given, training.case)
        dy = dy * (z.value > 0)
    found = oracle.step(x, dy)
    z = _sum(found["y"], given, training.case) if len(x) else found["y"]
    found["y"] = Near(z.value.clamp_min(0), z.bound) if training.act else z
    if training.cut:
        for name in ("y", "dx"):
            value, bound = found[name]
            found[name] = Near(value, bound + rounding(value, training.case.dtype))
    if given[0].residual is not None:
        found["dresidual"] = Near(dy, torch.zeros_like(dy))  # it is handed on as it came, or not at all
    return found


def _sum(y: Near, given: list[Given], case: Case) -> Near:
    """With the residual added: computed as ``y`` is, and rounded once more at the most."""
    if given[0].residual is None:
        return y
    r = torch.cat([kept(one.residual, one.piece.mask) for one in given])
    value = y.value + r
    return Near(value, y.bound + TERMS[computing(case.dtype)] * r.abs() + rounding(value, case.dtype))


def _residual(case: Case, piece: Piece, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1 + rank)
    r = torch.randn(piece.x.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    if piece.mask is not None:
        r = r.masked_fill(~piece.mask.unsqueeze(1), math.nan)
    return lay_out(r, case.dy_layout)


def _rows(given: list[Given]) -> tuple[Tensor, Tensor]:
    """Input and gradient of all ranks, as far as they count: ``(n, C)``."""
    rows = [(kept(x, mask), kept(dy, mask)) for (x, dy, mask), _ in given]
    x, dy = map(torch.cat, zip(*rows, strict=True))
    return x, dy


def _counts(given: list[Given]) -> list[int]:
    return [len(kept(piece.x, piece.mask)) for piece, _ in given]


def _values(t: Tensor, mask: Tensor | None, zero: Tensor) -> None:
    """Sets to zero, in place, what ``zero`` says, shape ``(n, C)``, of what :func:`kept` gives."""
    rows = t.movedim(1, -1)
    if mask is None:
        mask = torch.ones(rows.shape[:-1], dtype=torch.bool)
    mask = mask.expand(rows.shape[:-1])
    where = torch.zeros(rows.shape, dtype=torch.bool)
    where[mask] = zero
    rows.masked_fill_(where, 0)


def _back(layer: nn.Module, values: dict[str, Tensor] | None) -> Step:
    """On the CPU, for whoever compares."""
    buffers, found = copies(layer.named_buffers()), None if values is None else copies(values.items())
    return Step(*(None if d is None else {name: t.cpu() for name, t in d.items()} for d in (buffers, found)))
