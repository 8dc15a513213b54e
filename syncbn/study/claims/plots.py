"""The plots of a claim: a norm looks the same in all of them, and a caption says how to read each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil, floor, log10
from numbers import Real
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from syncbn.study.claims.result import PlotData
from syncbn.study.format import plural, power
from syncbn.study.report import plot_style
from syncbn.study.report.plot_style import COLOURS, MARKERS, MUTED, PAPER, set_scale, short
from syncbn.study.report.plots import Plot, heading

SIDES = ("none", "local", "sync", "group_norm", "local_mean", "ghost", "torch_sync")  # each has a look of its own
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (6, 1.2, 1, 1.2)))  # and so has each series
FILLS = ("full", "none", "left", "bottom")
DASHED, FILLED = ("solid", "dashed", "dotted", "dashed and dotted"), ("filled", "hollow", "half", "lower half")
CROWDED = 12  # places on x above which a band is clearer than a bar for each
LINE, GAP = 0.13, 0.4  # inches: a side's line in a row, and what a row has besides
ASIDE = 3.0  # points: how far from its place on x a side is drawn at most, so that sides do not cover each other


def draw(data: PlotData, name: str) -> Plot:
    """To be called, as whatever saves the figure, within ``drawing.style()``.

    Args:
        data: what is drawn; words on x become rows, from top to bottom, and values lie along them.
        name: of its files.

    Returns:
        The figure with its caption, or why there is none.
    """
    if data.y_log and data.level is not None and data.level <= 0:
        data = replace(data, level=None)
    mean = data.frame["mean"].astype(float)
    frame = data.frame[np.isfinite(mean) & ((mean > 0) | (not data.y_log))]
    if frame.empty:
        return Plot(name, data.title, f"No plot of {data.y}: no run has a value that can be drawn.")
    words = not all(isinstance(x, Real) for x in frame.x)
    figure, ranges = _rows(data, frame) if words else _lines(data, frame)
    _legends(figure, data, frame, words)
    caption = [*_about(data, frame, words), *_styles(data, frame, words)]
    if any((of_one.low < low).any() or (of_one.high > high).any() for of_one, low, high in ranges):
        caption.append("Intervals that go beyond an axis are cut off.")
    if lost := len(data.frame) - len(frame):
        why = "missing, not finite, or not above zero" if data.y_log else "missing or not finite"
        caption.append(f"Not drawn: {plural(lost, 'value')}, {why}.")
    return Plot(name, data.title, " ".join(caption), figure)


def look(side: str, series: int = 0) -> dict[str, Any]:
    """Of a norm, as arguments of a line: the same in all plots. A side that is none of :data:`SIDES` has one by its
    name.
    """
    at = SIDES.index(side) if side in SIDES else sum(map(ord, side))
    fill = FILLS[series % len(FILLS)]
    return {
        "color": COLOURS[at % len(COLOURS)],
        "marker": MARKERS[at % len(MARKERS)],
        "fillstyle": "full" if fill == "none" else fill,
        "markerfacecolor": PAPER if fill == "none" else COLOURS[at % len(COLOURS)],
        "markerfacecoloralt": PAPER,
    }


Ranges = list[tuple[pd.DataFrame, float, float]]  # points, and the ends of their axis of values


def _lines(data: PlotData, frame: pd.DataFrame) -> tuple[Figure, Ranges]:
    """A line for each side and series; panels, two beside each other, which share their axis of values."""
    panels = unique(frame.panel)
    several, headings = len(panels) > 1, [heading(panel) for panel in panels]
    lines = ceil(len(panels) / 2)
    deep = 1.6 + 0.2 * any("\n" in text for text in headings)
    figure, axes = plot_style.new(
        1.1 + (deep * lines if several else 2.9), lines, 1 + several, shared=several, by_row=several
    )
    across = sorted({float(x) for x in frame.x})
    if data.x_log and across[0] > 0:
        axes[0].set_xscale("log")
    elif data.x_log and across[-1] > 0:  # 0 has a place too: a prior of nothing, say
        axes[0].set_xscale("symlog", linthresh=min(x for x in across if x > 0), linscale=0.5)
    _places(axes[0].xaxis, across, data.x_log, 15 if several else 34)
    aside = _room(axes[0], across, plot_style.WIDTH * 72 * (0.42 if several else 0.8))
    ranges = []
    for at, axis in enumerate(axes):
        if at >= len(panels):
            axis.set_visible(False)
            continue
        here = frame[frame.panel == panels[at]]
        _draw_lines(here, axis, unique(frame.side), unique(frame.series), aside)
        axis.set_title(headings[at])
        if at % 2 == 0 or not several:
            beside = frame[frame.panel.isin(panels[at : at + 2])]
            low, high = _limits(data, beside)
            _ticks(axis.yaxis, low, high, data.y_log, 5 if several else 8)
            axis.set_ylim(low, high)
            ranges.append((beside, low, high))
        if data.level is not None:
            axis.axhline(data.level, color=MUTED, linewidth=1.2, zorder=1)
    for axis in axes[max(len(panels) - 2, 0) : len(panels)] if several else axes:
        axis.set_xlabel(data.x)
        axis.tick_params(labelbottom=True)  # below it there may be none
    if several:
        figure.supylabel(data.y, size=11)
    else:
        axes[0].set_ylabel(data.y)
    return figure, ranges


def _draw_lines(frame: pd.DataFrame, axes: Axes, sides: Sequence[str], series: Sequence[str], aside: float) -> None:
    """With bars at places that leave room for them; with bands where there is nothing to be put aside."""
    crowded = aside == 0
    for (side, of), points in frame.groupby(["side", "series"], sort=False):
        points = points.assign(x=points.x.astype(float)).sort_values("x")
        x, mean, low, high = (points[column].to_numpy(float) for column in ("x", "mean", "low", "high"))
        how = look(side, series.index(of))
        off = aside * (2 * sides.index(side) / max(len(sides) - 1, 1) - (len(sides) > 1)) / 72  # inches
        place = axes.transData + ScaledTranslation(off, 0, axes.figure.dpi_scale_trans)
        if crowded:
            axes.fill_between(x, low, high, color=how["color"], alpha=0.16, linewidth=0)
        else:
            axes.vlines(x, low, high, color=how["color"], linewidth=1.2, alpha=0.7, transform=place)
        every = (3 * sides.index(side) % 10, 10) if crowded else 1
        dashes = DASHES[series.index(of) % len(DASHES)]
        axes.plot(x, mean, **how, linestyle=dashes, markersize=5.5, markevery=every, zorder=3, transform=place)


def _rows(data: PlotData, frame: pd.DataFrame) -> tuple[Figure, Ranges]:
    """A row for each word, in it a line for each side, on which all series lie."""
    labels = [f"{panel} · {x}" if panel else str(x) for panel, x in zip(frame.panel, frame.x, strict=True)]
    words, sides, series = list(dict.fromkeys(labels)), unique(frame.side), unique(frame.series)
    height = GAP + LINE * len(sides)
    figure, (axes,) = plot_style.new(1.3 + len(words) * height)
    for label, (_, point) in zip(labels, frame.iterrows(), strict=True):
        which = series.index(point.series)
        how = look(point.side, which)
        at = words.index(label) - 0.22 + (0.11 + LINE * sides.index(point.side)) / height
        at += 0.04 * (which - (len(series) - 1) / 2) / height  # so that one interval does not hide the other
        axes.hlines(at, point.low, point.high, color=how["color"], linewidth=1.4)
        axes.plot(point["mean"], at, **how, linestyle="none", markersize=6.5, zorder=3)
    plot_style.rows(axes, [short(word, 50) for word in words])
    axes.set_ylim(bottom=len(words) - 1.22 + (0.2 + LINE * (len(sides) - 1)) / height + 0.03)
    low, high = _limits(data, frame)
    _ticks(axes.xaxis, low, high, data.y_log, 6)
    axes.set_xlim(low, high)
    axes.set_xlabel(data.y)
    if data.level is not None:
        axes.axvline(data.level, color=MUTED, linewidth=1.2, zorder=1)
    return figure, [(frame, low, high)]


def _legends(figure: Figure, data: PlotData, frame: pd.DataFrame, words: bool) -> None:
    """Sides above the axes; below, where there is something to tell, series and the level."""
    sides = [Line2D([], [], **look(side), markersize=7, label=short(side, 24)) for side in unique(frame.side)]
    _legend(figure, sides, "outside upper left")
    series = unique(frame.series)
    keys = []
    for at, of in enumerate(series if len(series) > 1 else ()):
        how = look("none", at) | {"linestyle": "none" if words else DASHES[at % len(DASHES)]}
        keys.append(Line2D([], [], **how, label=short(of, 40)))
    if data.level is not None and data.level_label:
        keys.append(Line2D([], [], color=MUTED, linewidth=1.2, label=short(data.level_label, 44)))
    if keys:
        _legend(figure, keys, "outside lower left")


def _legend(figure: Figure, keys: Sequence[Line2D], place: Literal["outside upper left", "outside lower left"]) -> None:
    """In one line, if it fits."""
    labels = [str(key.get_label()) for key in keys]
    fits = sum(map(len, labels)) + 8 * len(keys) <= 60
    columns = len(keys) if fits else max(1, 44 // (max(map(len, labels)) + 6))
    figure.legend(keys, labels, loc=place, ncols=columns, columnspacing=1.2, handlelength=2.6)


def _limits(data: PlotData, frame: pd.DataFrame) -> tuple[float, float]:
    """Of the axis of values: all means, and their intervals but for what is far beyond the others. Two seeds that lie
    apart have an interval that would leave nothing else to see.
    """
    columns = frame[["low", "mean", "high"]].to_numpy(float)
    if data.y_log:
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = np.log10(columns)
    means = columns[:, 1]
    half = np.abs(columns[:, [0, 2]] - means[:, None])
    half = half[np.isfinite(half)]
    room = max(float(np.ptp(means)), 2 * float(np.median(half)) if len(half) else 0.0)
    there = columns[np.isfinite(columns)]
    low, high = max(there.min(), means.min() - room), min(there.max(), means.max() + room)
    if data.level is not None:
        level = log10(data.level) if data.y_log else data.level
        low, high = min(low, level), max(high, level)
    pad = 0.05 * (high - low) or (0.3 if data.y_log else 0.05 * abs(high) or 1.0)
    low, high = float(low - pad), float(high + pad)
    if data.y_log:
        return 10**low, 10**high
    return (max(low, -0.03 * high) if means.min() >= 0 else low), high


def _ticks(axis: Axis, low: float, high: float, logarithmic: bool, most: int) -> None:
    """At round numbers; on a logarithmic axis no more of them than can be read, however many decades it spans."""
    if logarithmic:
        set_scale(axis, "log")
        axis.set_major_locator(FixedLocator(list(_decades(low, high, most))))
    else:
        axis.set_major_locator(MaxNLocator(most - 1, steps=[1, 2, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _decades(low: float, high: float, most: int) -> Iterator[float]:
    exponents = range(floor(log10(low)), ceil(log10(high)) + 1)
    for parts in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1, 3)):
        inside = [tick for at in exponents for part in parts if low <= (tick := part * 10.0**at) <= high]
        if len(inside) <= most:
            yield from inside
            return
    whole = [at for at in exponents if low <= 10.0**at <= high]
    yield from (10.0**at for at in whole if at % ceil(len(whole) / most) == 0)


def _plain(value: float) -> str:
    """A power of ten as such where it has many zeros."""
    far = value > 0 and not 1e-4 < value < 1e6 and log10(value).is_integer()
    return power(round(log10(value))) if far else plot_style.plain(value)


def _places(axis: Axis, values: list[float], logarithmic: bool, width: int) -> None:
    """Ticks where the data is, if their labels fit into so many letters."""
    if sum(len(_plain(value)) + 1 for value in values) <= width:
        axis.set_major_locator(FixedLocator(values))
    elif logarithmic and values[0] > 0:
        axis.set_major_locator(FixedLocator(list(_decades(values[0], values[-1], width // 5))))
    else:
        axis.set_major_locator(MaxNLocator(width // 6 + 1, integer=all(value.is_integer() for value in values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _room(axes: Axes, across: Sequence[float], width: float) -> float:
    """Sets the ends of the horizontal axis, with room beyond all places, or on either side of the only one.

    Args:
        axes: whose scale is set.
        across: places, ascending.
        width: of the axis, about, in points.

    Returns:
        How far from its place a side may be drawn, in points: not so far that it seems to be at another; 0 if places
        are too many for that.
    """
    scale = axes.xaxis.get_transform()
    at = scale.transform(np.asarray(across, float))
    pad = 0.05 * float(at[-1] - at[0]) or 0.5
    low, high = float(at[0]) - pad, float(at[-1]) + pad
    axes.set_xlim(*scale.inverted().transform(np.array([low, high])))
    if len(across) > CROWDED:
        return 0.0
    nearest = float(np.diff(at).min()) if len(at) > 1 else np.inf
    return min(ASIDE, 0.2 * width * nearest / (high - low))


def _about(data: PlotData, frame: pd.DataFrame, words: bool) -> Iterator[str]:
    """What the axes are, and what the marks."""
    y = data.y[:1].upper() + data.y[1:]
    panels = ", a panel for each condition" if frame.panel.nunique() > 1 and not words else ""
    yield f"{y}, a row for each {data.x}." if words else f"{y} against {data.x}{panels}."
    if frame.panel.nunique() > 2 and not words:
        yield "Panels beside each other have one vertical axis; others have their own."
    at_zero = ", but for 0," if any(isinstance(x, Real) and x <= 0 for x in frame.x) else ""
    if data.x_log and data.y_log and not words:
        yield f"Both axes are logarithmic{at_zero}".rstrip(",") + "."
    elif data.y_log:
        yield f"The {'axis' if words else 'vertical axis'} is logarithmic."
    elif data.x_log and not words:
        yield f"The horizontal axis is logarithmic{at_zero}".rstrip(",") + "."
    counts = sorted({int(n) for n in frame.n})
    runs = plural(counts[0], "run") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
    bands = not words and frame.x.nunique() > CROWDED
    yield f"{'Lines' if bands else 'Markers'}: mean of {runs}; {'bands' if bands else 'bars'}: 95 % interval."


def _styles(data: PlotData, frame: pd.DataFrame, words: bool) -> Iterator[str]:
    series = unique(frame.series)
    if len(series) > 1:
        names = FILLED if words else DASHED
        said = "; ".join(f"{names[at % len(names)]}: {of}" for at, of in enumerate(series))
        yield f"{said[:1].upper()}{said[1:]}."
    if data.level is not None and data.level_label:
        yield f"Grey line: {data.level_label}."


def unique(values: pd.Series) -> list[str]:
    """In the order in which they come."""
    return list(dict.fromkeys(values))
