"""Whatever the shapes, types, options and layouts, and however the batch is cut: one process, but for rounding."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.testing import force_exchange, without_native
from tests.nn.support.cases import Case, Piece, cases, make_layer, make_piece
from tests.nn.support.exactness import Near, OneProcess, kept, worst
from tests.support.ranks import RankError, Ranks


class Step(NamedTuple):
    """What one step gave on one rank; only the buffers where the layer refused the batch."""

    buffers: dict[str, Tensor]
    values: dict[str, Tensor] | None = None


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_case_equals_one_process_but_for_rounding(ranks: Ranks, world_size: int) -> None:
    assert hold(ranks, world_size, examples=30, seed=0) >= 30


PHASES = [hypothesis.Phase.generate, hypothesis.Phase.shrink]  # its explanations take long and say little here

# In backward, torch's CPU kernel adds up the bfloat16 values of dy in bfloat16, unless x and dy have one dense layout.
HALF = {"frozen": (False,), "channels": 61, "dtype": torch.bfloat16, "steps": 3}
FOUND = {
    "bfloat16, channels_last x, contiguous dy": Case((3,), ((4, 4),), x_layout="channels_last", **HALF),
    "bfloat16, contiguous x, channels_last dy": Case((3,), ((4, 4),), dy_layout="channels_last", **HALF),
    "bfloat16, sliced": Case((3,), ((4, 4),), x_layout="sliced", dy_layout="sliced", **HALF),
    "masked, channels_last": Case((1,), ((4, 2, 4),), (False,), mask="values", x_layout="channels_last", seed=4565620),
    "large, channels_last, float64 weights": Case(
        (7,), ((33, 31),), (False,), 67, parameters=torch.float64, x_layout="channels_last"
    ),
    "transposed": Case((7,), ((),), (False,), x_layout="transposed", dy_layout="transposed", offset=100.0),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=list(FOUND))
def test_what_was_once_found(ranks: Ranks, case: Case) -> None:
    check(case, ranks.run(on_a_rank, case, world_size=len(case.samples)))


class RanksFailed(BaseException):
    """A rank raised or hung. No Exception: hypothesis would take minutes to find the smallest case that hangs."""


def hold(ranks: Ranks, world_size: int, examples: int, seed: int) -> int:
    """Tries so many different cases or some more, and returns how many held. The first that does not is made small."""
    held: set[Case] = set()

    def holds(case: Case) -> None:
        if case in held:  # different draws may give one case
            return
        try:
            results = ranks.run(on_a_rank, case, world_size=world_size, timeout=20)
        except RankError as error:
            raise RanksFailed(f"{case}\n{error}") from None
        check(case, results)
        held.add(case)

    run = 0
    while len(held) < examples:
        run += 1
        some = max(examples - len(held), 20)  # hypothesis begins each run with the smallest case
        drawn = hypothesis.seed(f"{seed} {run}")(hypothesis.given(cases(world_size))(holds))
        hypothesis.settings(max_examples=some, database=None, deadline=None, print_blob=False, phases=PHASES)(drawn)()
    return len(held)


def on_a_rank(rank: int, world_size: int, case: Case) -> list[Step]:
    layer = make_layer(case)
    return [one_step(layer, case, make_piece(case, step, rank), case.frozen[rank]) for step in range(case.steps)]


def one_step(layer: nn.Module, case: Case, piece: Piece, frozen: bool) -> Step:
    values: dict[str, Tensor] = {}
    x = piece.x.requires_grad_(not frozen)
    if not frozen:
        x.register_hook(lambda dx: values.update(dx=dx))  # x.grad has the layout of x, whatever the layer gives
    layer.zero_grad()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if case.autocast else nullcontext()
    kernels = nullcontext() if case.native else without_native()
    try:
        with force_exchange(), autocast, kernels:  # a world of one exchanges too, to run the distributed code
            y = layer(x) if piece.mask is None else layer(x, piece.mask)
    except ValueError as error:
        assert "Expected more than 1 value per channel when training" in str(error)  # noqa: PT017
        return Step(copies(layer.named_buffers()))
    assert y.requires_grad == (case.affine or not all(case.frozen))
    if y.requires_grad:
        with nullcontext() if case.native else without_native():
            y.backward(piece.dy)
    values["y"] = y.detach()
    values |= {"dgamma" if name == "weight" else "dbeta": p.grad for name, p in layer.named_parameters()}
    return Step(copies(layer.named_buffers()), copies(values.items()))


def copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named if tensor is not None}


def check(case: Case, results: list[list[Step]]) -> None:
    oracle = OneProcess(case)
    for number, steps in enumerate(zip(*results, strict=True)):
        check_step(oracle, [make_piece(case, number, rank) for rank in range(len(steps))], steps, f"step {number}")


def check_step(oracle: OneProcess, pieces: list[Piece], steps: Sequence[Step], where: str) -> None:
    rows = [kept(piece.x, piece.mask) for piece in pieces]
    counts = [len(part) for part in rows]
    refused = [step.values is None for step in steps]
    assert refused == [sum(counts) == 1] * len(steps), f"{where}, {counts} values a rank: {refused} were refused"
    if sum(counts) != 1:
        expected = oracle.step(torch.cat(rows), torch.cat([kept(piece.dy, piece.mask) for piece in pieces]))
        for name, (value, bound) in expected.items():
            got = [step.values.get(name) for step in steps if step.values is not None]
            if name in ("dgamma", "dbeta"):
                check_shares(got, Near(value, bound), oracle.case.parameters, f"{where}, {name}")
                continue
            nears = map(Near, value.split(counts), bound.split(counts))
            for rank, (actual, piece, near) in enumerate(zip(got, pieces, nears, strict=True)):
                assert (actual is None) == (name == "dx" and oracle.case.frozen[rank])
                if actual is not None:
                    check_values(actual, piece, near, f"{where}, rank {rank}, {name}")
    for name, near in oracle.buffers().items():
        first, *others = [step.buffers[name] for step in steps]
        assert_near(first, near, f"{where}, {name}")
        assert all(torch.equal(first, other) for other in others), f"{where}, {name} differs between ranks"


def check_shares(shares: list[Tensor], near: Near, dtype: torch.dtype, what: str) -> None:
    """Gradients of a parameter: each rank has its own values' share."""
    assert {share.dtype for share in shares} == {dtype}, what
    assert_near(torch.stack(shares).double().sum(0), near, what)


def check_values(actual: Tensor, piece: Piece, near: Near, what: str) -> None:
    """``y`` or ``dx`` of one rank: numbers, type, layout, and zeros where masked."""
    torchs = as_torch(piece.x)
    assert (actual.dtype, actual.shape) == (torchs.dtype, torchs.shape), what
    if actual.numel():
        assert layouts(actual) == layouts(torchs), f"{what} has strides {actual.stride()}, torch's {torchs.stride()}"
    assert_near(kept(actual, piece.mask), near, what)
    if piece.mask is not None:
        assert not kept(actual, ~piece.mask).any(), f"{what}, where masked"


def assert_near(actual: Tensor, near: Near, what: str) -> None:
    times = worst(actual, near)
    assert times <= 1, f"{what}: off by {times:.3g} times what rounding may do"


def as_torch(x: Tensor) -> Tensor:
    """What torch's batch norm gives for this input; in evaluation, which takes a single value too."""
    mean = torch.zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return F.batch_norm(x.detach(), mean, mean + 1)


def layouts(t: Tensor) -> list[torch.memory_format]:
    formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    return [layout for layout in formats if t.is_contiguous(memory_format=layout)]
