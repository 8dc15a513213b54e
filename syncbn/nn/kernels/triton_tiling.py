"""Grid and tile sizes: how the kernels of :mod:`syncbn.nn.kernels.gpu` divide a tensor among the programs of a GPU."""

from functools import lru_cache
from typing import Any, NamedTuple

_TILE = 4096  # values that a program holds at once
# Up to so many values of a channel one program adds up alone, so that no merge follows: in rows, where a program
# processes several channels at once, and in planes.
_FEW = {True: 2048, False: 8192}


class Shape(NamedTuple):
    """Memory layout of a tensor: ``outer`` rows, ``stride`` values apart; see :mod:`.triton_kernels`.

    Attributes:
        rows: whether a row is a position and its columns are the channels; else it is a sample.
        outer: rows.
        channels: C.
        positions: of a channel in a row; 1 with ``rows``.
        itemsize: bytes of a value.
        processors: of the GPU.
        stages: tiles that a program loads ahead.
    """

    rows: bool
    outer: int
    channels: int
    positions: int
    itemsize: int
    processors: int = 2
    stages: int = 1

    @property
    def stride(self) -> int:
        return self.channels * self.positions

    @property
    def bits_stride(self) -> int:
        """Bytes in a row of a tensor that has a bit for each value; each channel begins with a new byte."""
        return -(-self.channels // 8) if self.rows else self.channels * -(-self.positions // 8)

    @property
    def values(self) -> int:
        """The number of values of a channel."""
        return self.outer * self.positions


class Tiling(NamedTuple):
    """Grid and tile size of a pass.

    Attributes:
        a, b: rows and columns of a tile.
        columns: ranges of columns, of ``b`` each.
        splits: programs that share the rows of such a range.
        parts: programs that process a part of the same channel.
        numbers: the kernel's arguments for layout and tiles, constants last.
        kind: the properties for which Triton compiles another kernel.
    """

    a: int
    b: int
    columns: int
    splits: int
    parts: int
    numbers: tuple[int | bool, ...]
    kind: tuple[Any, ...]


@lru_cache(maxsize=4096)
def reduction(at: Shape) -> Tiling:
    """The tiling for sums over each channel: one program if it has few values, else programs for all processors."""
    few = at.values <= _FEW[at.rows]
    if at.rows:
        b = _columns_in_a_row(at)
        if few and at.channels < b * at.processors:  # parts of a cache line, for more programs
            b = max(16, min(b, 32 // at.itemsize))
        columns = -(-at.channels // b)
    else:
        b = max(16, power(at.positions)) if few else _columns_in_a_plane(at)
        columns = at.channels * -(-at.positions // b)
    # Two programs a processor, all at once; or so many ranges of columns that the last wave hardly counts.
    programs = 2 * at.processors
    if few:
        return _tiling(at, b, columns, 1)
    return _tiling(at, b, columns, programs // columns if columns <= programs else -(-4 * programs // columns))


@lru_cache(maxsize=4096)
def elementwise(at: Shape) -> Tiling:
    """The tiling for an elementwise pass: whole waves of 2, 3 or 4 programs a processor."""
    if at.rows:
        b = _columns_in_a_row(at)
        columns = -(-at.channels // b)
    else:
        b = _columns_in_a_plane(at)
        columns = at.channels * -(-at.positions // b)
    return _tiling(at, b, columns, -(-24 * at.processors // columns))


def _tiling(at: Shape, b: int, columns: int, splits: int) -> Tiling:
    a = max(1, min(_TILE // b, power(at.outer)))
    splits = max(1, min(-(-at.outer // a), splits))
    parts = splits if at.rows else splits * (columns // at.channels)
    layout = (at.outer, at.positions, at.channels, at.stride, at.bits_stride)
    tile = (a, b, at.rows, at.stages)
    return Tiling(a, b, columns, splits, parts, (*layout, *tile), (*kind(*layout), *tile))


def _columns_in_a_row(at: Shape) -> int:
    """Columns of a tile: a cache line."""
    return max(16, min(128 // at.itemsize, power(at.channels)))


def _columns_in_a_plane(at: Shape) -> int:
    """Columns of a tile: all of a channel if they are few, else the number that leaves the fewest threads idle.

    With few rows a tile has more columns, to have its full size.
    """
    least = max(256, min(_TILE // power(at.outer), _TILE))
    if at.positions <= max(1024, least):
        return max(16, power(at.positions))
    choice = [b for b in (4096, 2048, 1024, 512, 256) if b >= least]
    return min(choice, key=lambda b: (-(-at.positions // b) * b, -b))


def kind(*sizes: int) -> tuple[Any, ...]:
    """The properties of integers that Triton specializes on: equal to 1, divisible by 16, within 32 bits."""
    return tuple((size == 1, size % 16 == 0, size < 2**31) for size in sizes)


def power(size: int) -> int:
    """The smallest power of two of at least ``size``."""
    return 1 << (size - 1).bit_length()
