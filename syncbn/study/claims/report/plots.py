"""Draws the plots of a claim. A norm has the same colour and marker in all plots; captions explain how to read them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import log10
from numbers import Real

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from syncbn.study.claims.result import PlotData
from syncbn.study.format import plural
from syncbn.study.report.plots import plot_scales, plot_style
from syncbn.study.report.plots.plot_labels import first_upper, heading
from syncbn.study.report.plots.plot_style import DASHES, MUTED, WIDTH, Look, Plot, short

SIDES = (
    "none",
    "local",
    "sync",
    "group_norm",
    "local_mean",
    "ghost",
    "torch_sync",
    "shuffle",
)  # each has its own style
DASHED, FILLED = ("solid", "dashed", "dotted", "dashed and dotted"), ("filled", "hollow", "half", "lower half")
CROWDED = 12  # if x has more values than this, bands replace error bars
LINE, GAP = 0.13, 0.4  # inches: height of a side in a row, and the additional height of a row
ASIDE = 3.0  # points: largest horizontal offset of a side, so that sides do not cover each other
LEVEL = 1.2  # points: width of the reference line


def draw(data: PlotData, name: str) -> Plot:
    """Draws one plot. Call this, and the function that saves the figure, within ``plot_style.style()``.

    If ``x`` contains strings, they become rows from top to bottom with a horizontal value axis.

    Returns:
        The figure with its caption. Without values to draw there is no figure, and the caption contains the reason.
    """
    if data.y_log and data.level is not None and data.level <= 0:
        data = replace(data, level=None)
    mean = data.frame["mean"].astype(float)
    frame = data.frame[np.isfinite(mean) & ((mean > 0) | (not data.y_log))]
    frame, is_clipped = _clipped(data, frame)
    if frame.empty:
        return Plot(name, data.title, f"No plot of {data.y}: no run has a value that can be drawn.")
    words = not all(isinstance(x, Real) for x in frame.x)
    figure, ranges = _rows(data, frame) if words else _lines(data, frame)
    _legends(figure, data, frame, words)
    caption = [*_axes_caption(data, frame, words), *_styles_caption(data, frame, words)]
    if any((of_one.low < low).any() or (of_one.high > high).any() for of_one, low, high in ranges):
        caption.append("Intervals that go beyond an axis are cut off.")
    if is_clipped:
        caption.append("Intervals end at the limits of the metric.")
    if lost := len(data.frame) - len(frame):
        why = "missing, not finite, or not above zero" if data.y_log else "missing or not finite"
        caption.append(f"Not drawn: {plural(lost, 'value')}, {why}.")
    return Plot(name, data.title, " ".join(caption), figure)


def _clipped(data: PlotData, frame: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """The frame with intervals within the limits of the metric, and whether an interval went beyond."""
    ends = frame[["low", "high"]].astype(float)
    inside = ends.clip(data.least, data.most)
    return frame.assign(low=inside.low, high=inside.high), bool((inside != ends)[ends.notna()].to_numpy().any())


def look(side: str, series: int = 0) -> Look:
    """Colour, marker and dashes of a norm in all plots. Other sides than :data:`SIDES` get a look from their name."""
    at = SIDES.index(side) if side in SIDES else sum(map(ord, side))
    return Look.of(short(side, 24), at, series)


Ranges = list[tuple[pd.DataFrame, float, float]]  # points, and the limits of their value axis


def _lines(data: PlotData, frame: pd.DataFrame) -> tuple[Figure, Ranges]:
    """Draws a line for each side and series. Two panels stand in a row and share the value axis."""
    panels = unique(frame.panel)
    several, headings = len(panels) > 1, [heading(panel) for panel in panels]
    height = 1.6 + 0.2 * any("\n" in text for text in headings) if several else 3.0
    figure, axes = plot_style.panels(len(panels), height, shared=several, by_row=several)
    across = sorted({float(x) for x in frame.x})
    if data.x_log and across[0] > 0:
        axes[0].set_xscale("log")
    elif data.x_log and across[-1] > 0:  # 0 can occur too, for example a prior of 0
        axes[0].set_xscale("symlog", linthresh=min(x for x in across if x > 0), linscale=0.5)
    plot_scales.at_places(axes[0].xaxis, across, 15 if several else 34)
    aside = plot_scales.room(axes[0], across, WIDTH * 72 * (0.42 if several else 0.8), ASIDE)
    ranges = []
    for at, axis in enumerate(axes):
        here = frame[frame.panel == panels[at]]
        _draw_lines(here, axis, unique(frame.side), unique(frame.series), aside if len(across) <= CROWDED else None)
        axis.set_title(headings[at])
        if at % 2 == 0:
            beside = frame[frame.panel.isin(panels[at : at + 2])]
            low, high = _limits(data, beside)
            axis.set_ylim(low, high)
            plot_scales.ticks(axis.yaxis, data.y_log, 5 if several else 8)
            ranges.append((beside, low, high))
        if data.level is not None:
            plot_style.level(axis, data.level, width=LEVEL)
    for axis in axes[-2:]:
        axis.set_xlabel(data.x)
        axis.tick_params(labelbottom=True)  # the row below may have no panel here
    if several:
        figure.supylabel(data.y, size=11)
    else:
        axes[0].set_ylabel(data.y)
    return figure, ranges


def _draw_lines(
    frame: pd.DataFrame, axes: Axes, sides: Sequence[str], series: Sequence[str], aside: float | None
) -> None:
    """Draws lines with error bars that are offset by ``aside``; with bands if ``aside`` is None."""
    for (side, of), points in frame.groupby(["side", "series"], sort=False):
        points = points.assign(x=points.x.astype(float)).sort_values("x")
        x, mean, low, high = (points[column].to_numpy(float) for column in ("x", "mean", "low", "high"))
        how, at = look(side, series.index(of)), sides.index(side)
        if aside is None:
            plot_style.band(axes, x, mean, low, high, how, (3 * at % 10, 10))
        else:
            place = plot_scales.aside(axes, at, len(sides), aside)
            options = {"linestyle": how.dashes, "elinewidth": 1.2, "transform": place}
            plot_style.intervals(axes, x, mean, low, high, how, size=5.5, **options)


def _rows(data: PlotData, frame: pd.DataFrame) -> tuple[Figure, Ranges]:
    """Draws a row for each string on x. A row has one line for each side, with the markers of all series on it."""
    labels = [f"{panel} · {x}" if panel else str(x) for panel, x in zip(frame.panel, frame.x, strict=True)]
    words, sides, series = list(dict.fromkeys(labels)), unique(frame.side), unique(frame.series)
    height = GAP + LINE * len(sides)
    figure, (axes,) = plot_style.new(1.3 + len(words) * height)
    for label, (_, point) in zip(labels, frame.iterrows(), strict=True):
        which = series.index(point.series)
        at = words.index(label) - 0.22 + (0.11 + LINE * sides.index(point.side)) / height
        at += 0.04 * (which - (len(series) - 1) / 2) / height  # so that intervals do not hide each other
        values = point["mean"], point.low, point.high
        plot_style.intervals(axes, at, *values, look(point.side, which), upright=False, size=6.5, elinewidth=1.4)
    plot_style.rows(axes, [short(word, 50) for word in words])
    axes.set_ylim(bottom=len(words) - 1.22 + (0.2 + LINE * (len(sides) - 1)) / height + 0.03)
    low, high = _limits(data, frame)
    axes.set_xlim(low, high)
    plot_scales.ticks(axes.xaxis, data.y_log, 6)
    axes.set_xlabel(data.y)
    if data.level is not None:
        plot_style.level(axes, data.level, upright=True, width=LEVEL)
    return figure, [(frame, low, high)]


def _legends(figure: Figure, data: PlotData, frame: pd.DataFrame, words: bool) -> None:
    """Adds a legend of sides above the axes and, if there are any, of series and the reference line below."""
    plot_style.legend(figure, [look(side).handle for side in unique(frame.side)])
    series = unique(frame.series)
    keys = []
    for at, of in enumerate(series if len(series) > 1 else ()):
        keys.append(replace(look("none", at), label=short(of, 40)).handle)
        keys[-1].set_linestyle("none" if words else DASHES[at % len(DASHES)])
    if data.level is not None and data.level_label:
        keys.append(Line2D([], [], color=MUTED, linewidth=LEVEL, label=short(data.level_label, 44)))
    if keys:
        plot_style.legend(figure, keys, "outside lower left")


def _limits(data: PlotData, frame: pd.DataFrame) -> tuple[float, float]:
    """Limits of the value axis. They include all means, but cut off intervals that are much longer than the others.

    The interval of two distant seeds would otherwise compress everything else.
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


def _axes_caption(data: PlotData, frame: pd.DataFrame, words: bool) -> Iterator[str]:
    """Sentences of the caption on the axes and the markers."""
    y = first_upper(data.y)
    panels = ", a panel for each condition" if frame.panel.nunique() > 1 and not words else ""
    rows = f", a row for each {data.x}" if data.x else ""
    yield f"{y}{rows}." if words else f"{y} against {data.x}{panels}."
    if frame.panel.nunique() > 2 and not words:
        yield "Panels in one row share a vertical axis."
    at_zero = ", except at 0," if any(isinstance(x, Real) and x <= 0 for x in frame.x) else ""
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


def _styles_caption(data: PlotData, frame: pd.DataFrame, words: bool) -> Iterator[str]:
    series = unique(frame.series)
    if len(series) > 1:
        names = FILLED if words else DASHED
        said = "; ".join(f"{names[at % len(names)]}: {of}" for at, of in enumerate(series))
        yield f"{first_upper(said)}."
    if data.level is not None and data.level_label:
        yield f"Grey line: {data.level_label}."


def unique(values: pd.Series) -> list[str]:
    """The distinct values in their order of appearance."""
    return list(dict.fromkeys(values))
