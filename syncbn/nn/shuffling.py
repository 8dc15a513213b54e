"""Shuffled samples (He et al. 2020, section 3.3): permuted over the ranks before an encoder, restored after it.

Statistics of each rank are then over a random choice of all ranks' samples. In contrastive learning both views of an
image start on one rank, and its statistics would reveal which samples belong together.
"""

import operator
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn.comm import all_reduce, all_to_all, groups

FORWARD, RESTORE = "shuffle", "restore after shuffle"


class Shuffled:
    """Samples that :func:`shuffle` has permuted over the ranks.

    Attributes:
        samples: the samples that this rank has now, of the shape, type and memory format of those that it gave.
    """

    samples: Tensor

    def __init__(self, x: Tensor, permutation: Tensor, group: dist.ProcessGroup | None, counts: list[int]) -> None:
        self._rows, self._group = len(x), group
        if group is None:
            self._back = permutation.argsort().to(x.device)
            self.samples = x.index_select(0, permutation.to(x.device))
        else:
            there = all_to_all.route(permutation, counts, group.rank(), x.device)
            self._return = there.reversed()
            self.samples = all_to_all.move(x, there, group, FORWARD)

    def restore(self, y: Tensor) -> Tensor:
        """Returns the rows of ``y`` to the samples that they were computed from.

        Args:
            y: a row for each of ``samples``, in their order; rows of any shape and type, the same on all ranks.

        Returns:
            The rows in the order of the samples that :func:`shuffle` was given. Gradients take the opposite way.

        Raises:
            ValueError: on all ranks, if a rank has another number of rows, or rows of another shape, type or need
                of a gradient.
        """
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._restore)(y)  # type: ignore[no-any-return]
        return self._restore(y)

    def _restore(self, y: Tensor) -> Tensor:
        _check_samples(y, RESTORE)
        fault = "" if len(y) == self._rows else f"y has {len(y)} rows, and shuffle returned {self._rows} samples"
        if self._group is None:
            if fault:
                raise ValueError(f"{RESTORE}: {fault}")
            return y.index_select(0, self._back)
        _compare(y, "", fault, self._group, RESTORE)
        return all_to_all.move(y, self._return, self._group, RESTORE)


def shuffle(
    x: Tensor,
    *,
    group: object = "world",
    seed: int | None = None,
    permutation: Tensor | Sequence[int] | None = None,
) -> Shuffled:
    """Permutes samples over the ranks of a group, for an encoder whose batch norm has per-device statistics.

    ::

        shuffled = syncbn.shuffle(images, seed=step)  # a new seed at each step, the same on all ranks
        features = shuffled.restore(encoder(shuffled.samples))

    Gradients are exact through both ways. Each way costs one all-to-all of the rows, the backward passes too. Before
    it, one all-reduce of five numbers per rank compares the ranks; on a GPU the host waits for it. So ranks that do
    not fit together raise an error instead of waiting. All ranks of the group must call it, and take part in backward.
    Under torch.compile it is a graph break.

    Samples are numbered over all ranks: the first sample of each rank, then the second of each, and so on; with ``n``
    samples on each of ``W`` ranks, sample ``k`` of rank ``r`` is number ``k * W + r``. One process that has the
    samples in this order arranges them alike. Without a process group, and in a group of one rank, nothing is sent.

    Args:
        x: shape ``(N, ...)``, any type. ``N`` may differ between ranks and be 0; each rank keeps its number.
        group: the ranks: "world", "node", a number of consecutive ranks, a ProcessGroup, or a DeviceMesh of one
            dimension.
        seed: of a random permutation, drawn on the CPU; the generators of the process are not touched.
        permutation: instead of a seed: place ``i`` gets sample ``permutation[i]``. Each number once, from 0 on.

    Returns:
        The samples of this rank after the permutation, and :meth:`Shuffled.restore`.

    Raises:
        ValueError: both or none of ``seed`` and ``permutation``; numbers that are no permutation of the group's
            samples; a group that does not fit. On all ranks: ranks with different seeds or permutations, or whose
            samples have different shapes, types or needs of a gradient.
        TypeError: arguments of another type.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(_shuffle)(x, group, seed, permutation)  # type: ignore[no-any-return]
    return _shuffle(x, group, seed, permutation)


def _shuffle(x: Tensor, group: object, seed: int | None, permutation: Tensor | Sequence[int] | None) -> Shuffled:
    _check_samples(x, FORWARD)
    if (seed is None) == (permutation is None):
        raise ValueError("shuffle: pass either seed= (of a random permutation) or permutation=")
    given = _whole_number(seed) if permutation is None else _numbers(permutation)
    partners = groups.resolve(groups.parse(group))
    if partners is None or partners.size() == 1:
        return Shuffled(x, _permutation(given, len(x)), None, [])
    if all_reduce.is_alone():  # a step that is repeated on this rank only: the samples stay where they are
        return Shuffled(x, torch.arange(len(x)), None, [])
    what = f"seed={given}" if permutation is None else f"another permutation, of {len(permutation)} numbers"
    counts = _compare(x, what, "", partners, FORWARD, str(given))
    return Shuffled(x, _permutation(given, sum(counts)), partners, counts)


def _check_samples(x: object, place: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{place}: {type(x).__name__} is no Tensor; pass a tensor with the samples first")
    if x.dim() == 0:
        raise ValueError(f"{place}: a tensor without dimensions has no samples; its shape must be (N, ...)")


def _whole_number(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError:
        raise TypeError(f"shuffle: seed={seed!r} is no whole number") from None


def _numbers(permutation: Tensor | Sequence[int]) -> list[int]:
    numbers = permutation.tolist() if isinstance(permutation, Tensor) else list(permutation)
    if not isinstance(numbers, list) or not all(type(each) is int for each in numbers):
        raise TypeError("shuffle: permutation= must be a sequence of whole numbers, or a tensor of one dimension")
    return numbers


def random_permutation(samples: int, seed: int) -> Tensor:
    """The permutation that :func:`shuffle` draws from a seed for this number of samples of all ranks."""
    try:
        generator = torch.Generator().manual_seed(seed)
    except (RuntimeError, ValueError):
        raise ValueError(f"shuffle: seed={seed}: use a number of 64 bits") from None
    return torch.randperm(samples, generator=generator)


def _permutation(given: int | list[int], samples: int) -> Tensor:
    if isinstance(given, int):
        return random_permutation(samples, given)
    if sorted(given) != list(range(samples)):
        works = f"each of 0 to {samples - 1} once" if samples else "no number"
        raise ValueError(
            f"shuffle: permutation= of {len(given)} numbers: all ranks together have {samples} samples, so it must "
            f"have {works}"
        )
    return torch.tensor(given, dtype=torch.int64)


def _compare(
    x: Tensor, what: str, fault: str, group: dist.ProcessGroup, place: str, arrangement: str = ""
) -> list[int]:
    """The number of rows of each rank; one all-reduce, of a size that no rank can get wrong.

    Args:
        x: this rank's rows.
        what: how errors name this rank's arrangement.
        fault: why this rank cannot continue; empty if it can.
        group: the ranks.
        place: the name in errors.
        arrangement: must be the same on all ranks.

    Raises:
        ValueError: on every rank, if a rank has a fault or differs.
    """
    needs = x.requires_grad and torch.is_grad_enabled()
    row = f"rows of shape {tuple(x.shape[1:])} and type {str(x.dtype).removeprefix('torch.')}"
    mine = [bool(fault), len(x), zlib.crc32(arrangement.encode()), zlib.crc32(row.encode()), needs]
    table = torch.zeros(group.size(), len(mine), dtype=torch.float64, device=x.device)
    table[group.rank()] = torch.tensor(mine, dtype=torch.float64)
    total = all_reduce.all_sum(table.flatten(), group, f"{place} forward")
    faults, counts, *columns = total.view_as(table).long().t().tolist()
    if any(faults):
        raise ValueError(f"{place}: {fault or f'rank {faults.index(1)} has another number of rows than samples'}")
    for column, own in zip(columns, (what, row, f"{'a' if needs else 'no'} need of gradients"), strict=True):
        if len(set(column)) > 1:
            other = next(rank for rank, each in enumerate(column) if each != column[group.rank()])
            raise ValueError(f"{place}: rank {group.rank()} has {own}, and rank {other} differs; use the same on all")
    return list(counts)
