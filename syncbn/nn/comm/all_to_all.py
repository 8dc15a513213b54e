"""Moves rows of a tensor between the ranks of a group: one all-to-all, differentiable any number of times.

A permutation numbers the rows of all ranks as :mod:`syncbn.nn.simulation` numbers samples: first the first row of
each rank, then the second row of each, and so on. Each rank keeps its number of rows.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn.comm import lockstep, observer


class Route(NamedTuple):
    """What one rank sends and receives for a permutation.

    Attributes:
        taken: the rows of this rank that it sends, in the order of their destination ranks.
        sent: how many of them go to each rank.
        placed: the positions of the rows that it receives, in the order of their source ranks.
        received: how many of them come from each rank.
    """

    taken: Tensor
    sent: list[int]
    placed: Tensor
    received: list[int]

    def reversed(self) -> "Route":
        """The way back."""
        return Route(self.placed, self.received, self.taken, self.sent)


def route(permutation: Tensor, counts: list[int], rank: int, device: torch.device) -> Route:
    """The route of ``rank``: row ``i`` of all ranks' rows becomes what row ``permutation[i]`` was.

    Args:
        permutation: each number from 0 to ``sum(counts) - 1`` once, on the CPU; the same on all ranks.
        counts: the number of rows of each rank.
        rank: this rank's number within the group.
        device: of the rows, where the indices are needed.
    """
    owner, row = _interleaved(counts)
    source, source_row = owner[permutation], row[permutation]
    mine, leaving = (owner == rank).nonzero().flatten(), (source == rank).nonzero().flatten()
    placed = source[mine].argsort(stable=True)
    leaving = leaving[owner[leaving].argsort(stable=True)]
    sent, received = (each.bincount(minlength=len(counts)).tolist() for each in (owner[leaving], source[mine]))
    return Route(source_row[leaving].to(device), sent, placed.to(device), received)


def move(x: Tensor, by: Route, group: dist.ProcessGroup, place: str) -> Tensor:
    """The rows that ``by`` brings to this rank, with the memory format of ``x``.

    Args:
        x: at least one dimension; shape and type of a row are the same on all ranks.
        by: the route of this rank.
        group: the ranks.
        place: the name in errors.
    """
    moved: Tensor = _Move.apply(x, by, group, place)  # type: ignore[no-untyped-call]  # of torch
    return moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Route, group: dist.ProcessGroup, place: str) -> Tensor:
        ctx.by, ctx.group, ctx.place = by, group, place
        return _send(x, by, group, f"{place} forward")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return move(grads[0], ctx.by.reversed(), ctx.group, f"{ctx.place} backward"), None, None, None


def _send(x: Tensor, by: Route, group: dist.ProcessGroup, place: str) -> Tensor:
    y = torch.empty_like(x)
    if lockstep.enabled():
        lockstep.check_in_step(x.new_empty(x.shape[1:]), group, place)  # the number of rows may differ between ranks
    leaving = x.index_select(0, by.taken).resolve_conj().resolve_neg().contiguous()
    arriving = torch.empty_like(leaving)
    if x.shape[1:].numel():
        _all_to_all(_as_bytes(arriving), _as_bytes(leaving), by, group, place)
    return y.index_copy_(0, by.placed, arriving)


def _all_to_all(output: Tensor, input: Tensor, by: Route, group: dist.ProcessGroup, place: str) -> None:
    watch: AbstractContextManager[None] = nullcontext()
    if observer.observer is not None:
        watch = observer.observer.sending(place, input)
    try:
        with watch:
            dist.all_to_all_single(output, input, by.received, by.sent, group=group)
    except RuntimeError as error:
        raise RuntimeError(f"layer {place}: {error}") from error


def _as_bytes(rows: Tensor) -> Tensor:
    """A view of contiguous rows, for gloo, which does not know all types."""
    return rows.view(len(rows), rows.shape[1:].numel()).view(torch.uint8)


def _interleaved(counts: list[int]) -> tuple[Tensor, Tensor]:
    """The rank that has each of all ranks' rows, and which of its rows it is."""
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    row = torch.cat([torch.arange(count) for count in counts])
    order = (row * len(counts) + owner).argsort()
    return owner[order], row[order]
