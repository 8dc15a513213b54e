"""Draws the plots of a comparison, each with a caption that explains it or the reason for its absence."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.runs.metric import Metric
from syncbn.study.format import share, span, times
from syncbn.study.report.plots import plot_scales, plot_style
from syncbn.study.report.plots.plot_labels import (
    AXES,
    brief,
    first_upper,
    heading,
    hollow,
    left_out,
    row_labels,
    unsaid,
)
from syncbn.study.report.plots.plot_style import (
    BETTER,
    INK,
    MUTED,
    PAPER,
    WIDTH,
    WORSE,
    Fill,
    Look,
    Plot,
    finite,
    short,
)
from syncbn.study.report.ranges import difference_ends
from syncbn.study.report.tables import margin_text, ways, with_unit, worded_verdict

ROWS, PANELS, LAYERS = 40, 12, 20  # maximum in a figure; the tables have all rows
ASIDE = 16.0  # points: largest horizontal offset of a side, so that sides do not cover each other
_SHAPES: dict[str, tuple[str, Fill]] = {  # marker and fill by verdict
    "lower": ("o", "full"),
    "higher": ("o", "full"),
    "no difference": ("s", "full"),
    "undecided": ("o", "none"),
    "too few pairs": ("x", "full"),
}
NAMES = re.compile(r"metric|effects|seeds|curves(-(train|val)-(loss|error))?|cost|layers")  # of plots


def draw(comparison: Comparison) -> list[Plot]:
    """Draws all plots, in the order of the page. Call this and ``plot_style.save`` within ``plot_style.style()``."""
    look = looks(comparison)
    plots = [
        _metric(comparison),
        _effects(comparison),
        _seeds(comparison),
        *_curves(comparison),
        _cost(comparison, look),
        _layers(comparison),
    ]
    if comparison.factor not in AXES:  # otherwise sides are values of a setting that needs an explanation
        return plots
    meaning = f" {', '.join(comparison.sides)}: {AXES[comparison.factor]}."
    return [plot if plot.figure is None else replace(plot, caption=plot.caption + meaning) for plot in plots]


def looks(comparison: Comparison) -> dict[tuple[str, str], Look]:
    """The look of each side and way of running: a colour and shape for each side, hollow for a second way."""
    every_way = ways(comparison)
    return {
        (side, way): Look.of(short(f"{side}, {way}" if len(every_way) > 1 else side, 42), at, way != every_way[0])
        for at, side in enumerate(comparison.sides)
        for way in every_way
    }


def _metric(comparison: Comparison) -> Plot:
    comparison = _sides_as_conditions(comparison)
    metric, means = comparison.metric, finite(comparison.means, "mean")
    name, title = with_unit(metric.label, metric.unit), f"{first_upper(metric.label)} of each side"
    if means.empty:
        return Plot("metric", title, f"No plot of the {metric.label}: no run has one.")
    look = {key: each for key, each in looks(comparison).items() if len(_of(means, key))}
    if means.how.nunique() == 1:
        look = {key: replace(each, label=short(key[0], 42), fill="full", dashes="-") for key, each in look.items()}
    series = list(look)
    numeric = bool(comparison.axis) and bool(np.isfinite(means["at"]).all()) and means["at"].nunique() > 1
    conditions = [c for c in comparison.conditions if (means.condition == c).any()]
    figure, (axes,) = plot_style.new(3.8 if numeric else 1.5 + len(conditions) * (0.45 + 0.14 * len(series)))
    places = sorted(means["at"].unique()) if numeric else []
    off = _horizontal(axes, places) if numeric else 0.0
    for at, key in enumerate(series):
        of_one = _of(means, key)
        if numeric:
            where = dict(zip(of_one.condition, of_one["at"], strict=True))
            moved: Mapping[str, Any] = {"transform": plot_scales.aside(axes, at, len(series), off)}
        else:
            row_off = 0.12 + 0.5 * (at - (len(series) - 1) / 2) / max(len(series) - 1, 2)
            where, moved = {condition: y + row_off for y, condition in enumerate(conditions)}, {}
        _draw_means(axes, where, of_one, look[key], metric, upright=numeric, **moved)
    every = list(means["mean"])
    if plot_scales.spans_octaves(every):
        plot_scales.logarithmic(axes.yaxis if numeric else axes.xaxis)
    if numeric:
        axes.set_xlabel(AXES.get(comparison.axis, comparison.axis))
        axes.set_ylabel(name)
    else:
        plot_style.rows(axes, [short(text, 46) for text in brief(conditions)])
        axes.set_xlabel(name)
    if len(series) > 1:
        plot_style.legend(figure, [look[key].handle for key in series])
    runs = span(str(int(means.n.min())), str(int(means.n.max())))
    caption = (
        f"{first_upper(metric.label)}{f', in {metric.unit}' if metric.unit else ''}: {metric.better} is better."
        f" Markers: mean over {runs} {'seed' if runs == '1' else 'seeds'}."
        f"{' Those of one condition are drawn side by side.' if numeric and len(series) > 1 else ''}"
        f" Bars{' and bands' if numeric else ''}: 95 % interval of the mean, cut to the range of the metric."
        f"{_logarithmic(every, places)}"
        f"{hollow(comparison) if means.how.nunique() > 1 else ''}"
    )
    return Plot("metric", title, caption, figure)


def _horizontal(axes: Axes, places: Sequence[float]) -> float:
    """Scales the axis of the conditions; returns the largest horizontal offset of a side, in points."""
    if plot_scales.spans_octaves(places):
        axes.set_xscale("log")
    plot_scales.at_places(axes.xaxis, places, 34)
    return plot_scales.room(axes, places, WIDTH * 72 * 0.8, ASIDE)


def _draw_means(
    axes: Axes,
    where: Mapping[str, float],
    means: pd.DataFrame,
    look: Look,
    metric: Metric,
    *,
    upright: bool,
    **moved: Any,
) -> None:
    """Draws the means of a side with their 95 % intervals, cut to the metric's range.

    ``where`` has the positions of the conditions, ``moved`` the ``transform`` with the horizontal offset, if any. With
    ``upright``, values are on the vertical axis, and the means are joined.
    """
    at, mean = [where[each] for each in means.condition], means["mean"].to_numpy(float)
    low, high = (means[end].fillna(means["mean"]).clip(metric.least, metric.greatest) for end in ("low", "high"))
    style: dict[str, Any] = {"linestyle": look.dashes if upright else "none", "linewidth": 1.6, "capsize": 3}
    plot_style.intervals(axes, at, mean, low, high, look, upright=upright, **style, **moved)
    if upright and len(at) > 1:
        axes.fill_between(at, low, high, color=look.colour, alpha=0.13, linewidth=0, **moved)
    ends = np.array([[*at, *at], [*low.where(low > 0, means["mean"]), *high]])  # a logarithmic axis has no 0
    axes.update_datalim(np.column_stack(list(ends if upright else ends[::-1])))


def _sides_as_conditions(comparison: Comparison) -> Comparison:
    """The sides as conditions of one series, if they are numbers of one setting and nothing else varies."""
    numbers = all(re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", side) for side in comparison.sides)
    if not numbers or len(comparison.conditions) > 1 or "," in comparison.factor:
        return comparison
    sides = sorted(comparison.sides, key=float)
    means, runs = comparison.means, comparison.runs
    means = means.assign(condition=means["side"], at=means["side"].astype(float), side="mean").sort_values("at")
    runs = runs.assign(condition=runs["side"], side="mean")
    return replace(comparison, axis=comparison.factor, sides=["mean"], conditions=sides, means=means, runs=runs)


def _effects(comparison: Comparison) -> Plot:
    metric, unit = comparison.metric, comparison.metric.difference_unit
    effects = finite(comparison.effects, "difference")
    title = f"Difference from {comparison.baseline}"
    if effects.empty:
        return Plot("effects", title, "No plot of differences: no two runs of different sides make a pair.")
    shown = effects.head(ROWS)
    figure, (axes,) = plot_style.new(1.35 + plot_style.ROW * len(shown))
    plot_style.level(axes, 0, upright=True)
    verdicts = [worded_verdict(row, metric.better) for _, row in shown.iterrows()]
    for at, ((_, row), (_, tone)) in enumerate(zip(shown.iterrows(), verdicts, strict=True)):
        colour = {"better": BETTER, "worse": WORSE}.get(tone, INK)
        look = Look("", colour, *_SHAPES.get(row.verdict, ("o", "none")))
        plot_style.intervals(axes, at, row.difference, *difference_ends(comparison, row), look, upright=False)
    labels = row_labels(comparison, shown, comparison.effects)
    plot_style.rows(axes, labels, [words for words, _ in verdicts])
    bottom, top = axes.get_ylim()
    borders = np.repeat([top, *(np.arange(1, len(shown)) - 0.5), bottom], 2)[1:-1]
    half = np.repeat(shown.margin.to_numpy(float), 2)
    axes.fill_betweenx(borders, -half, half, color=MUTED, alpha=0.22, linewidth=0)
    shown_ends = [end for _, row in shown.iterrows() for end in difference_ends(comparison, row)]
    ends = [end for end in (*shown_ends, *shown.difference) if np.isfinite(end)]
    bent = plot_scales.bend(axes, ends, float(shown.margin.max()))
    side = f"{effects.side.iloc[0]} " if effects.side.nunique() == 1 else ""
    axes.set_xlabel(short(with_unit(f"{metric.label}, {side}minus {comparison.baseline}", unit), 50))
    caption = (
        f"Difference of the {metric.label} from that of {comparison.baseline}, between runs of the same seed"
        f"{f', in {unit}' if unit else ''}. Values left of zero are lower, and {metric.better} is better."
        f" Markers: mean over the pairs; lines: 95 % interval, which ends where the {metric.label} does."
        f" Grey band: the range that counts as no difference, {margin_text(comparison)}."
        " Filled circles: a difference, blue if better, orange if worse; squares: no difference; hollow circles:"
        " undecided; crosses: too few pairs."
        f"{f' The axis is linear up to ±{plot_scales.plain(bent)} and logarithmic beyond.' if bent else ''}"
        f"{unsaid(comparison, shown)}{left_out(len(comparison.effects), len(shown), 'row')}"
    )
    return Plot("effects", title, caption, figure)


def _seeds(comparison: Comparison) -> Plot:
    metric, title, used = comparison.metric, "Seed by seed", _values(comparison)
    panels = [
        (condition, how, of_one)
        for (condition, how), of_one in used.groupby(["condition", "how"], sort=False)
        if of_one.side.nunique() > 1
    ]
    if not panels:
        return Plot("seeds", title, "No plot seed by seed: no two runs of different sides make a pair.")
    panels.sort(key=lambda panel: comparison.conditions.index(panel[0]))
    shown, look = panels[:PANELS], looks(comparison)
    figure, axes = plot_style.panels(len(shown), 2.1)
    several = used.how.nunique() > 1
    conditions = brief([condition for condition, _, _ in shown])
    for axis, condition, (_, how, of_one) in zip(axes, conditions, shown, strict=True):
        sides = [side for side in comparison.sides if (of_one.side == side).any()]
        for _, seed in of_one.groupby("seed"):
            by_side = seed.set_index("side").value.reindex(sides).dropna()
            axis.plot([sides.index(side) for side in by_side.index], by_side, color=MUTED, linewidth=0.9, alpha=0.7)
        for at, side in enumerate(sides):
            dots = of_one[of_one.side == side].value
            axis.plot([at] * len(dots), dots, **look[side, how].style, markersize=7, linestyle="none")
        axis.set_xlim(-0.4, len(sides) - 0.6)
        axis.set_xticks([])
        axis.set_title("\n".join([heading(condition), *([short(how, 24)] if several else [])]))
        plot_scales.ticks(axis.yaxis, plot_scales.spans_octaves(of_one.value), 6)
    figure.supylabel(with_unit(metric.label, metric.unit), size=11)
    plot_style.legend(figure, [look[key].handle for key in look if len(_of(used, key))])
    caption = (
        f"{first_upper(with_unit(metric.label, metric.unit))} of each run, a panel for each condition; {metric.better}"
        " is better. A line joins the runs of one seed. Lines with the same slope show a difference, lines that cross"
        " show chance. Each panel has its own axis, logarithmic if the values span octaves."
        f"{left_out(len(panels), len(shown), 'panel')}{hollow(comparison)}"
    )
    return Plot("seeds", title, caption, figure)


def _curves(comparison: Comparison) -> Iterator[Plot]:
    if comparison.curves.empty:
        yield Plot("curves", "Learning curves", "No learning curves: no run has metrics by epoch.")
    for metric, curves in comparison.curves.groupby("metric", sort=False):
        yield _curves_of(comparison, str(metric), finite(curves, "value"))


def _curves_of(comparison: Comparison, metric: str, curves: pd.DataFrame) -> Plot:
    name, title = f"curves-{re.sub(r'[^A-Za-z0-9]', '-', metric)}", f"Learning curves: {metric}"
    panels = [c for c in comparison.conditions if (curves.condition == c).any()]
    if not panels:
        return Plot(name, title, f"No learning curves of {metric}: no run has a finite value of it.")
    shown, look = panels[:PANELS], looks(comparison)
    figure, axes = plot_style.panels(len(shown), 2.1, shared=True)
    drawn = set()
    for axis, text, condition in zip(axes, brief(shown), shown, strict=True):
        for key in look:
            of_one = _of(curves[curves.condition == condition], key)
            if not of_one.empty:
                drawn.add(key)
                by_epoch = of_one.groupby("epoch").value.agg(["mean", "min", "max"])
                every = max(1, len(by_epoch) // 6)
                ends = by_epoch["min"], by_epoch["max"]
                plot_style.band(axis, by_epoch.index, by_epoch["mean"], *ends, look[key], every)
        axis.set_title(heading(text))
        plot_scales.linear(axis.xaxis, 6, integer=True)
    logarithmic = plot_scales.spans_octaves(curves.value)
    if logarithmic:
        plot_scales.logarithmic(axes[0].yaxis, 6)
    unit = "%" if metric.endswith("error") else ""
    figure.supylabel(with_unit(metric, unit), size=11)
    figure.supxlabel("epoch", size=11)
    plot_style.legend(figure, [look[key].handle for key in look if key in drawn])
    caption = (
        f"{metric}{f' (in {unit})' if unit else ''} after each epoch, a panel for each condition. Lines: mean over"
        " seeds; bands: from the least to the greatest seed."
        f"{' The vertical axis is logarithmic.' if logarithmic else ''}"
        f"{left_out(len(panels), len(shown), 'panel')}{hollow(comparison)}"
    )
    return Plot(name, title, caption, figure)


def _cost(comparison: Comparison, looks: Mapping[tuple[str, str], Look]) -> Plot:
    """Plots the time per step relative to the baseline, and the share of the step in collectives."""
    table, title = finite(comparison.cost, "ratio"), "Cost of a step"
    if table.empty:
        why = "no paired runs had a process for each device, and a run in one process does not measure the cost"
        return Plot("cost", title, f"No plot of the cost: {why}.")
    shown = table.head(ROWS)
    measured = bool(np.isfinite(shown.collectives).any())
    rows = plot_style.ROW * len(shown)
    figure, (ratio, *others) = plot_style.new(1.1 + rows * (1 + measured) + 0.6 * measured, 1 + measured)
    labels = row_labels(comparison, shown, comparison.cost)
    plot_style.level(ratio, 1, upright=True)
    for at, (_, row) in enumerate(shown.iterrows()):
        look = replace(looks[row.side, row.how], fill="full")
        plot_style.intervals(ratio, at, row.ratio, row.ratio_low, row.ratio_high, look, upright=False, size=7)
        for axes in others:
            axes.barh(at, row.collectives * 100, height=0.3, color=look.colour)
    plot_style.rows(ratio, labels, [times(value) for value in shown.ratio])
    ends = [*shown.ratio, *shown.ratio_low.dropna(), *shown.ratio_high.dropna(), 1.0]
    if plot_scales.spans_octaves(ends):
        plot_scales.logarithmic(ratio.xaxis)
    else:
        ratio.set_xlim(left=min(0.0, min(ends)))
    ratio.set_xlabel(short(f"time per step, as a multiple of that of {comparison.baseline}", 52))
    for axes in others:
        plot_style.rows(axes, labels, [share(value) for value in shown.collectives])
        axes.set_xlabel("share of a step spent in collectives (%)")
        axes.set_xlim(left=0)
    bars = " Bars: the share of a step that a device spends in batch norm's all-reduces, waiting included."
    caption = (
        f"Time of a training step relative to {comparison.baseline} of the same seed and condition: 2 is twice as long."
        " Markers: geometric mean over seeds; lines: from the least to the greatest. Only runs with a process for each"
        " device."
        + (bars if measured else " The share of collectives was not monitored.")
        + unsaid(comparison, shown)
        + left_out(len(comparison.cost), len(shown), "row")
    )
    return Plot("cost", title, caption, figure)


def _layers(comparison: Comparison) -> Plot:
    """Plots the effective batch of each layer: the independent samples to which a device's statistics correspond."""
    table, title = finite(comparison.layers, "effective_batch"), "Layers that need shared statistics"
    if table.empty:
        return Plot("layers", title, "No plot of the layers: no run was monitored (statistics.csv).")
    shown = table.head(LAYERS)
    figure, (axes,) = plot_style.new(1.2 + plot_style.ROW * len(shown))
    for at, (_, row) in enumerate(shown.iterrows()):
        colour, face, hatch = (WORSE, PAPER, "///") if row.needs else (BETTER, BETTER, "")
        axes.barh(at, row.effective_batch, height=0.34, color=face, edgecolor=colour, hatch=hatch)
        axes.plot([row.device_batch] * 2, [at - 0.2, at + 0.2], color=INK, linewidth=2.4)
    notes = [f"spread {times(value)}" for value in shown.spread]
    plot_style.rows(axes, row_labels(comparison, shown, comparison.layers), notes)
    values = [*shown.effective_batch, *shown.device_batch]
    logarithmic = plot_scales.spans_octaves(values)
    if logarithmic:
        plot_scales.set_scale(axes.xaxis, "log", nonpositive="clip")
        axes.set_xlim(left=min(value for value in values if value > 0) / 2)
        plot_scales.logarithmic(axes.xaxis)
    axes.set_xlabel("independent samples per channel")
    caption = (
        "Number of independent samples to which one device's statistics correspond (effective batch), the layer with"
        " the greatest need first. Bars: effective batch; black ticks: values per channel on the device. Hatched orange"
        " bars: too few, the layer needs shared statistics; plain blue: enough. Spread: that of the devices' means, as"
        " a multiple of the spread by chance."
        f"{f' All of {table.side.iloc[0]}.' if table.side.nunique() == 1 else ''}"
        f"{' The axis is logarithmic.' if logarithmic else ''}{left_out(len(comparison.layers), len(shown), 'layer')}"
    )
    return Plot("layers", title, caption, figure)


def _values(comparison: Comparison) -> pd.DataFrame:
    """The paired runs with their values."""
    runs = finite(comparison.runs, "value")
    return runs[runs.used.astype(bool)]


def _of(frame: pd.DataFrame, key: tuple[str, str]) -> pd.DataFrame:
    """The rows of one side and way of running."""
    return frame[(frame.side == key[0]) & (frame.how == key[1])]


def _logarithmic(across: Sequence[float], along: Sequence[float]) -> str:
    if plot_scales.spans_octaves(across) and plot_scales.spans_octaves(along):
        return " Both axes are logarithmic."
    if plot_scales.spans_octaves(across):
        return " The axis of the values is logarithmic."
    return " The horizontal axis is logarithmic." if plot_scales.spans_octaves(along) else ""
