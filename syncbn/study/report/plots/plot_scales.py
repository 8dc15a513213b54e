"""Scales and ticks of axes: linear, logarithmic, symmetric logarithmic, and ticks at the data's positions."""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, floor, isfinite, log10

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation, Transform

from syncbn.study.format import power


def spans_octaves(values: Iterable[float]) -> bool:
    """Whether values suit a logarithmic axis: all are positive, and they span three octaves or more."""
    finite = [value for value in values if isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) >= 8 * min(finite)


def plain(value: float) -> str:
    """The text of a tick. Powers of ten with many zeros are written as powers."""
    if value > 0 and not 1e-4 < value < 1e6 and log10(value).is_integer():
        return power(round(log10(value)))
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}").replace("-", "−")


def linear(axis: Axis, most: int, *, integer: bool = False) -> None:
    """Sets at most ``most`` ticks at round numbers."""
    _ticks(axis, MaxNLocator(most - 1, steps=[1, 2, 5, 10], integer=integer))


def logarithmic(axis: Axis, most: int = 9) -> None:
    """Sets a logarithmic scale with at most ``most`` ticks at round numbers within the current limits."""
    set_scale(axis, "log", nonpositive="clip")
    low, high = sorted(axis.axes.get_xlim() if axis is axis.axes.xaxis else axis.axes.get_ylim())
    _ticks(axis, FixedLocator(list(_decades(low, high, most))))


def ticks(axis: Axis, is_logarithmic: bool, most: int) -> None:
    """:func:`logarithmic` or :func:`linear`."""
    (logarithmic if is_logarithmic else linear)(axis, most)


def at_places(axis: Axis, values: Sequence[float], width: int) -> None:
    """Sets ticks at the data's positions if their labels fit into ``width`` characters, else at round numbers.

    The positions are ascending, and the axis has its scale.
    """
    if sum(len(plain(value)) + 1 for value in values) <= width:
        _ticks(axis, FixedLocator(list(values)))
    elif axis.get_scale() == "log" and values[0] > 0:
        _ticks(axis, FixedLocator(list(_decades(values[0], values[-1], width // 5))))
    else:
        linear(axis, width // 6 + 2, integer=all(float(value).is_integer() for value in values))


def bend(axes: Axes, ends: Sequence[float], margin: float) -> float:
    """Scales the horizontal axis so that both the margin and much larger values are readable.

    If necessary, the axis is linear up to a limit and logarithmic beyond it, on both sides of 0.

    Returns:
        The limit; 0 if the whole axis is linear.
    """
    low, high = min(ends), max(ends)
    far = max(abs(low), abs(high))
    near = max(margin, far / 1000) * 2
    if far <= near * 8:  # both are 0 if a metric is always 0
        linear(axes.xaxis, 7)
        return 0.0
    near = 10.0 ** floor(log10(near))
    axes.set_xscale("symlog", linthresh=near, linscale=0.7)
    powers = near * 10.0 ** np.arange(0, np.ceil(np.log10(far / near)) + 1)
    low, high = min(low * 1.6, -near * 1.5), max(high * 1.6, near * 1.5)
    _ticks(axes.xaxis, FixedLocator([tick for tick in (*-powers[::-1], 0, *powers) if low <= tick <= high]))
    axes.set_xlim(low, high)
    return near


def set_scale(axis: Axis, scale: str, **options: float | str) -> None:
    """Sets the scale of an axis and of all axes that share it."""
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)(scale, **options)


def _ticks(axis: Axis, locator: Locator) -> None:
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def _decades(low: float, high: float, most: int) -> Iterator[float]:
    """At most ``most`` round numbers between ``low`` and ``high``, for any number of decades."""
    exponents = range(floor(log10(low)), ceil(log10(high)) + 1)
    for parts in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1, 3)):
        inside = [tick for at in exponents for part in parts if low <= (tick := part * 10.0**at) <= high]
        if len(inside) <= most:
            yield from inside
            return
    whole = [at for at in exponents if low <= 10.0**at <= high]
    yield from (10.0**at for at in whole if at % ceil(len(whole) / most) == 0)


def room(axes: Axes, across: Sequence[float], width: float, most: float) -> float:
    """Sets the limits of the horizontal axis, with room on both sides of the data's positions.

    Args:
        axes: with the scale of the horizontal axis set.
        across: positions of the data, ascending.
        width, most: approximate width of the axis, and upper limit of the result, in points.

    Returns:
        The offset, in points, by which a marker can be moved and still be closer to its position than to the next one.
    """
    scale = axes.xaxis.get_transform()
    at = scale.transform(np.asarray(across, float))
    pad = max(0.05, (most + 8) / width) * float(at[-1] - at[0]) or 0.5  # a marker has 8 points
    low, high = float(at[0]) - pad, float(at[-1]) + pad
    axes.set_xlim(*scale.inverted().transform(np.array([low, high])))
    nearest = float(np.diff(at).min()) if len(at) > 1 else np.inf
    return min(most, 0.2 * width * nearest / (high - low))


def aside(axes: Axes, at: int, count: int, points: float) -> Transform:
    """The transform for marker ``at`` of ``count`` at one position, spread over ``points`` to either side."""
    off = points * (2 * at / max(count - 1, 1) - (count > 1)) / 72  # inches
    return axes.transData + ScaledTranslation(off, 0, axes.figure.dpi_scale_trans)
