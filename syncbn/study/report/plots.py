"""The plots of a comparison. Each has a caption that explains it, or says why there is no such plot."""

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from syncbn.study.compare.comparison import Comparison
from syncbn.study.format import plural, share, times
from syncbn.study.report import plot_style
from syncbn.study.report.plot_style import BETTER, COLOURS, INK, MARKERS, MUTED, WORSE, Look, short
from syncbn.study.report.tables import margin_text, verdict, ways, with_unit

ROWS, PANELS = 40, 12  # that a figure has at most; the tables have all
_AXES = {
    "data.batch_size": "batch size per device (samples)",
    "data.global_batch_size": "batch size over all devices (samples)",
    "norm.batch_size": "normalization batch (samples)",
    "norm.group": "devices that share statistics",
    "trainer.devices": "devices",
    "optimizer.lr": "learning rate",
}
_SHAPES = {  # of a verdict: marker, filled
    "lower": ("o", True),
    "higher": ("o", True),
    "no difference": ("s", True),
    "undecided": ("o", False),
    "too few pairs": ("x", True),
}


@dataclass(frozen=True)
class Plot:
    """One figure.

    Attributes:
        name: of its files.
        title: what it shows.
        caption: how to read it, or why there is none.
        figure: None where there is nothing to show.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None = None


NAMES = re.compile(r"metric|effects|seeds|curves(-(train|val)-(loss|error))?|cost|layers")  # that a plot can have


def draw(comparison: Comparison) -> list[Plot]:
    """All plots, in the order of the page. To be called, as whatever saves them, within ``drawing.style()``."""
    plots = [
        _metric(comparison),
        _effects(comparison),
        _seeds(comparison),
        *_curves(comparison),
        _cost(comparison),
        _layers(comparison),
    ]
    if comparison.factor not in _AXES:  # else sides are bare values
        return plots
    meaning = f" {', '.join(comparison.sides)}: {_axis(comparison.factor)}."
    return [plot if plot.figure is None else replace(plot, caption=plot.caption + meaning) for plot in plots]


def looks(comparison: Comparison) -> dict[tuple[str, str], Look]:
    """How each side is drawn, by side and how it was run: a colour and shape a side, hollow for a second way."""
    every_way = ways(comparison)
    return {
        (side, way): Look(
            label=short(f"{side}, {way}" if len(every_way) > 1 else side, 42),
            colour=COLOURS[at % len(COLOURS)],
            marker=MARKERS[at % len(MARKERS)],
            filled=way == every_way[0],
        )
        for at, side in enumerate(comparison.sides)
        for way in every_way
    }


def _metric(comparison: Comparison) -> Plot:
    comparison = _turned(comparison)
    metric, means = comparison.metric, _finite(comparison.means, "mean")
    name, title = with_unit(metric.label, metric.unit), f"{_first_upper(metric.label)} of each side"
    if means.empty:
        return Plot("metric", title, f"No plot of the {metric.label}: no run has one.")
    look = looks(comparison)
    series = [key for key in look if ((means.side == key[0]) & (means.how == key[1])).any()]
    numeric = bool(comparison.axis) and bool(np.isfinite(means["at"]).all()) and means["at"].nunique() > 1
    conditions = [c for c in comparison.conditions if (means.condition == c).any()]
    figure, (axes,) = plot_style.new(3.8 if numeric else 1.5 + len(conditions) * (0.45 + 0.14 * len(series)))
    every = [*_values(comparison).value, *means["mean"]]
    for at, key in enumerate(series):
        of_one = means[(means.side == key[0]) & (means.how == key[1])]
        aside = (at - (len(series) - 1) / 2) / max(len(series) - 1, 2)
        seeds = _values(comparison)
        seeds = seeds[(seeds.side == key[0]) & (seeds.how == key[1])]
        if numeric:
            shift = _shift(means["at"], aside)
            where = dict(zip(of_one.condition, shift(of_one["at"].to_numpy(float)), strict=True))
        else:
            where = {condition: y + 0.12 + aside * 0.5 for y, condition in enumerate(conditions)}
        dots = seeds[seeds.condition.isin(list(where))]
        position = [where[c] for c in of_one.condition]
        _dots(axes, [where[c] for c in dots.condition], dots.value, look[key], upright=numeric)
        _bars(axes, position, of_one["mean"], of_one.sd, look[key], upright=numeric, line=numeric)
    across, along = (axes.yaxis, axes.xaxis) if numeric else (axes.xaxis, axes.yaxis)
    if plot_style.spans_octaves(every):
        plot_style.logarithmic(across, every)
    if numeric:
        plot_style.at_these(along, sorted(means["at"].unique()))
        axes.set_xlabel(_axis(comparison.axis))
        axes.set_ylabel(name)
    else:
        plot_style.rows(axes, [short(text, 46) for text in _brief(conditions)])
        axes.set_xlabel(name)
    if len(series) > 1:
        plot_style.legend(figure, [look[key].handle for key in series])
    counts = sorted(set(means.n.astype(int)))
    runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    caption = (
        f"{_first_upper(metric.label)}{f', in {metric.unit}' if metric.unit else ''}: {metric.better} is better."
        f" Large markers: mean over the seeds of a side ({runs} {'run' if runs == '1' else 'runs'} each)."
        " Bars: one standard deviation up and down. Small dots: single seeds."
        f"{_logarithmic(every, means['at'] if numeric else [])}"
        f"{_hollow(comparison)}"
    )
    return Plot("metric", title, caption, figure)


def _turned(comparison: Comparison) -> Comparison:
    """Where sides are numbers of one setting, and nothing else differs: the sides along an axis, as one series."""
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
    effects = _finite(comparison.effects, "difference")
    title = f"Difference from {comparison.baseline}"
    if effects.empty:
        return Plot("effects", title, "No plot of differences: no two runs of different sides make a pair.")
    shown = effects.head(ROWS)
    figure, (axes,) = plot_style.new(1.35 + plot_style.height_of_rows(len(shown)))
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for at, (_, row) in enumerate(shown.iterrows()):
        marker, filled = _SHAPES.get(row.verdict, ("o", False))
        tone = verdict(row, metric.better)[1]
        colour = {"better": BETTER, "worse": WORSE}.get(tone, INK)
        if np.isfinite(row.low) and np.isfinite(row.high):
            axes.plot([row.low, row.high], [at, at], color=colour, solid_capstyle="butt")
        face = colour if filled else plot_style.PAPER
        axes.plot(row.difference, at, marker=marker, color=colour, markerfacecolor=face, markersize=8, zorder=3)
    notes = [verdict(row, metric.better)[0] for _, row in shown.iterrows()]
    plot_style.rows(axes, _labels(comparison, shown, comparison.effects), notes)
    bottom, top = axes.get_ylim()
    borders = np.repeat([top, *(np.arange(1, len(shown)) - 0.5), bottom], 2)[1:-1]
    half = np.repeat(shown.margin.to_numpy(float), 2)
    axes.fill_betweenx(borders, -half, half, color=MUTED, alpha=0.22, linewidth=0)
    ends = pd.concat([shown.low, shown.high, shown.difference]).dropna()
    bent = _bend(axes, ends, float(shown.margin.max()))
    side = f"{effects.side.iloc[0]} " if effects.side.nunique() == 1 else ""
    axes.set_xlabel(short(with_unit(f"{metric.label}, {side}minus {comparison.baseline}", unit), 50))
    caption = (
        f"How much the {metric.label} of a side differs from that of {comparison.baseline}, between runs of the same"
        f" seed{f', in {unit}' if unit else ''}: left of zero it is lower, and {metric.better} is better."
        " Markers: mean over the pairs; lines: 95 % interval."
        f" Grey band: what counts as no difference, {margin_text(comparison)}."
        " Filled circles: a difference, blue if better, orange if worse; squares: no difference; hollow circles:"
        " undecided; crosses: too few pairs."
        f"{f' The axis is linear up to ±{plot_style.plain(bent)} and logarithmic beyond.' if bent else ''}"
        f"{_unsaid(comparison, shown)}{_left_out(len(comparison.effects), len(shown), 'row')}"
    )
    return Plot("effects", title, caption, figure)


def _seeds(comparison: Comparison) -> Plot:
    metric = comparison.metric
    title = "Seed by seed"
    used = _values(comparison)
    panels = [
        (condition, how, of_one)
        for (condition, how), of_one in used.groupby(["condition", "how"], sort=False)
        if of_one.side.nunique() > 1
    ]
    if not panels:
        return Plot("seeds", title, "No plot seed by seed: no two runs of different sides make a pair.")
    panels.sort(key=lambda panel: comparison.conditions.index(panel[0]) if panel[0] in comparison.conditions else 0)
    shown, look = panels[:PANELS], looks(comparison)
    figure, axes = _panels(len(shown), 2.1)
    several = used.how.nunique() > 1
    headings = _titles([condition for condition, _, _ in shown])
    for axis, heading, (_, how, of_one) in zip(axes, headings, shown, strict=False):
        sides = [side for side in comparison.sides if (of_one.side == side).any()]
        for _, seed in of_one.groupby("seed"):
            by_side = seed.set_index("side").value
            axis.plot(
                [at for at, side in enumerate(sides) if side in by_side],
                [by_side[side] for side in sides if side in by_side],
                color=MUTED,
                linewidth=0.9,
                alpha=0.7,
            )
        for at, side in enumerate(sides):
            _dots(axis, [at] * int((of_one.side == side).sum()), of_one[of_one.side == side].value, look[side, how], 7)
        axis.set_xlim(-0.4, len(sides) - 0.6)
        axis.set_xticks([])
        axis.set_title("\n".join([heading, *([short(how, 24)] if several else [])]))
        if plot_style.spans_octaves(of_one.value):
            plot_style.logarithmic(axis.yaxis, of_one.value)
        else:
            _few_ticks(axis)
    figure.supylabel(with_unit(metric.label, metric.unit), size=11)
    keys = [key for key in look if ((used.side == key[0]) & (used.how == key[1])).any()]
    plot_style.legend(figure, [look[key].handle for key in keys])
    caption = (
        f"{_first_upper(with_unit(metric.label, metric.unit))} of each run, a panel for each condition; {metric.better}"
        " is better. A line joins the runs of one seed, which began alike: lines that all go one way show a difference,"
        " lines that cross show chance. Each panel has an axis of its own, logarithmic where the values span octaves."
        f"{_left_out(len(panels), len(shown), 'panel')}{_hollow(comparison)}"
    )
    return Plot("seeds", title, caption, figure)


def _curves(comparison: Comparison) -> Iterator[Plot]:
    if comparison.curves.empty:
        yield Plot("curves", "Learning curves", "No learning curves: no run has metrics by epoch.")
    for metric, curves in comparison.curves.groupby("metric", sort=False):
        yield _curves_of(comparison, str(metric), _finite(curves, "value"))


def _curves_of(comparison: Comparison, metric: str, curves: pd.DataFrame) -> Plot:
    name, title = f"curves-{_plain_name(metric)}", f"Learning curves: {metric}"
    panels = [c for c in comparison.conditions if (curves.condition == c).any()]
    if not panels:
        return Plot(name, title, f"No learning curves of {metric}: no run has a finite value of it.")
    shown, look = panels[:PANELS], looks(comparison)
    figure, axes = _panels(len(shown), 2.1, shared=True)
    logarithmic = plot_style.spans_octaves(curves.value)
    drawn = []
    for axis, heading, condition in zip(axes, _titles(shown), shown, strict=False):
        for key in look:
            of_one = curves[(curves.condition == condition) & (curves.side == key[0]) & (curves.how == key[1])]
            if of_one.empty:
                continue
            drawn.append(key)
            by_epoch = of_one.groupby("epoch").value.agg(["mean", "min", "max"])
            axis.fill_between(
                by_epoch.index, by_epoch["min"], by_epoch["max"], color=look[key].colour, alpha=0.16, lw=0
            )
            axis.plot(
                by_epoch.index,
                by_epoch["mean"],
                marker=look[key].marker,
                markersize=5,
                markevery=max(1, len(by_epoch) // 6),
                markerfacecolor=look[key].face,
                linestyle="-" if look[key].filled else "--",
                color=look[key].colour,
            )
        axis.set_title(heading)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if logarithmic:
        plot_style.logarithmic(axes[0].yaxis, curves.value)
    unit = "%" if metric.endswith("error") else ""
    figure.supylabel(with_unit(metric, unit), size=11)
    figure.supxlabel("epoch", size=11)
    plot_style.legend(figure, [look[key].handle for key in look if key in drawn])
    caption = (
        f"{metric}{f' (in {unit})' if unit else ''} after each epoch, a panel for each condition. Lines: mean over"
        " seeds; bands: from the least to the greatest seed."
        f"{' The vertical axis is logarithmic.' if logarithmic else ''}"
        f"{_left_out(len(panels), len(shown), 'panel')}{_hollow(comparison)}"
    )
    return Plot(name, title, caption, figure)


def _cost(comparison: Comparison) -> Plot:
    cost, title = _finite(comparison.cost, "ratio"), "What a step costs"
    if cost.empty:
        why = "no runs whose devices are processes can be compared, and one process for several says nothing on cost"
        return Plot("cost", title, f"No plot of the cost: {why}.")
    shown, look = cost.head(ROWS), looks(comparison)
    looked = bool(np.isfinite(shown.collectives).any())
    rows = plot_style.height_of_rows(len(shown))
    figure, axes = plot_style.new(1.1 + rows * (2 if looked else 1) + 0.6 * looked, 2 if looked else 1)
    labels = _labels(comparison, shown, comparison.cost)
    ratio = axes[0]
    ratio.axvline(1, color=MUTED, linewidth=0.8)
    for at, (_, row) in enumerate(shown.iterrows()):
        look_at = replace(look[row.side, row.how], filled=True)
        if np.isfinite(row.ratio_low):
            ratio.plot([row.ratio_low, row.ratio_high], [at, at], color=look_at.colour, solid_capstyle="butt")
        _dots(ratio, [row.ratio], [at], look_at, 7)
    plot_style.rows(ratio, labels, [times(value) for value in shown.ratio])
    ends = [*shown.ratio, *shown.ratio_low.dropna(), *shown.ratio_high.dropna(), 1.0]
    if plot_style.spans_octaves(ends):
        plot_style.logarithmic(ratio.xaxis, ends)
    else:
        ratio.set_xlim(left=min(0.0, min(ends)))
    ratio.set_xlabel(short(f"time per step, as a multiple of that of {comparison.baseline}", 52))
    if looked:
        for at, (_, row) in enumerate(shown.iterrows()):
            if np.isfinite(row.collectives):
                axes[1].barh(at, row.collectives * 100, height=0.3, color=look[row.side, row.how].colour)
        plot_style.rows(axes[1], labels, [share(value) for value in shown.collectives])
        axes[1].set_xlabel("share of a step spent in collectives (%)")
        axes[1].set_xlim(left=0)
    caption = (
        f"Time of a training step relative to {comparison.baseline} of the same seed and condition: 2 is twice as long."
        " Markers: geometric mean over seeds; lines: from the least to the greatest. Only runs whose devices are"
        " processes."
        + (
            " Bars: the part of a step in which a device sends batch norm's messages, or waits for them."
            if looked
            else " No monitor looked at the share of collectives."
        )
        + _unsaid(comparison, shown)
        + _left_out(len(comparison.cost), len(shown), "row")
    )
    return Plot("cost", title, caption, figure)


def _layers(comparison: Comparison) -> Plot:
    layers, title = _finite(comparison.layers, "effective_batch"), "Which layers need it"
    if layers.empty:
        return Plot("layers", title, "No plot of the layers: no run was monitored (statistics.csv).")
    shown = layers.head(ROWS // 2)
    figure, (axes,) = plot_style.new(1.2 + plot_style.height_of_rows(len(shown)))
    for at, (_, row) in enumerate(shown.iterrows()):
        colour, hatch = (WORSE, "///") if row.needs else (BETTER, "")
        axes.barh(
            at,
            row.effective_batch,
            height=0.34,
            color=plot_style.PAPER if hatch else colour,
            edgecolor=colour,
            hatch=hatch,
        )
        axes.plot([row.device_batch] * 2, [at - 0.2, at + 0.2], color=INK, linewidth=2.4)
    plot_style.rows(
        axes,
        _labels(comparison, shown, comparison.layers),
        [f"spread {times(value)}" for value in shown.spread],
    )
    values = [*shown.effective_batch, *shown.device_batch]
    logarithmic = plot_style.spans_octaves(values)
    if logarithmic:
        plot_style.logarithmic(axes.xaxis, values)
        axes.set_xlim(left=min(value for value in values if value > 0) / 2)
    axes.set_xlabel("independent samples per channel")
    caption = (
        "How many independent samples the statistics of one device are worth, the neediest layer first. Bars: worth;"
        " black ticks: values per channel that the device has. Hatched orange bars: too few, the layer needs shared"
        " statistics; plain blue: enough. Spread: of the devices' means, as a multiple of what chance alone gives."
        f"{f' All of {layers.side.iloc[0]}.' if layers.side.nunique() == 1 else ''}"
        f"{' The axis is logarithmic.' if logarithmic else ''}{_left_out(len(comparison.layers), len(shown), 'layer')}"
    )
    return Plot("layers", title, caption, figure)


def _values(comparison: Comparison) -> pd.DataFrame:
    """Runs that are in a pair, which means and differences are of."""
    runs = _finite(comparison.runs, "value")
    return runs[runs.used.astype(bool)]


def _finite(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that have a number there; an empty frame's columns have no type."""
    return frame[np.isfinite(frame[column].astype(float))]


def _panels(count: int, height: float, *, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """Two side by side."""
    columns = min(count, 2)
    lines = -(-count // columns)
    figure, axes = plot_style.new(1.0 + height * lines, lines, columns, shared=shared)
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes


def _dots(
    axes: Axes, x: Sequence[float], y: Sequence[float], look: Look, size: float = 3.5, *, upright: bool = True
) -> None:
    if not upright:
        x, y = y, x
    alpha = 0.55 if size < 5 else 1.0
    axes.plot(
        x, y, look.marker, color=look.colour, markerfacecolor=look.face, markersize=size, alpha=alpha, linestyle="none"
    )


def _bars(
    axes: Axes, at: Sequence[float], mean: pd.Series, sd: pd.Series, look: Look, *, upright: bool, line: bool
) -> None:
    x, y, bar = (at, mean, "yerr") if upright else (mean, at, "xerr")
    axes.errorbar(
        x,
        y,
        **{bar: sd.fillna(0)},
        fmt=f"{look.marker}{'-' if line and look.filled else '--' if line else ''}",
        color=look.colour,
        markerfacecolor=look.face,
        markersize=8,
        linewidth=1.4,
        capsize=3,
        zorder=3,
    )


def _shift(at: pd.Series, aside: float) -> Callable[[np.ndarray], np.ndarray]:
    """Moves one side's points a little, so that sides do not cover each other."""
    values = np.array(sorted(at.unique()), dtype=float)
    if plot_style.spans_octaves(values):
        return lambda x: x * 2 ** (aside * 0.35)
    return lambda x: x + aside * 0.12 * np.diff(values).min()


def _bend(axes: Axes, ends: pd.Series, margin: float) -> float:
    """Where differences are far beyond the margin, both are to be seen: linear near zero, logarithmic beyond.

    Returns:
        Where the logarithmic part begins; 0 if there is none.
    """
    far = float(ends.abs().max())
    near = max(margin, far / 1000) * 2
    if far <= near * 8:  # both are 0 where a metric is
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plot_style.plain(value)))
        return 0.0
    near = 10 ** float(np.floor(np.log10(near)))
    axes.set_xscale("symlog", linthresh=near, linscale=0.7)
    powers = near * 10.0 ** np.arange(0, np.ceil(np.log10(far / near)) + 1)
    low = min(float(ends.min()) * 1.6, -near * 1.5)
    high = max(float(ends.max()) * 1.6, near * 1.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks([tick for tick in (*-powers[::-1], 0, *powers) if low <= tick <= high])
    axes.set_xlim(low, high)  # after the ticks, which would widen it
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plot_style.plain(value)))
    return near


def _few_ticks(axis: Axes) -> None:
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plot_style.plain(value)))


def _labels(comparison: Comparison, frame: pd.DataFrame, whole: pd.DataFrame) -> list[str]:
    """Of the rows shown of a table: layer, condition, side and how, where there are several of them."""
    columns = [list(frame.layer)] if "layer" in frame.columns else []
    if len(comparison.conditions) > 1:
        columns.append(_brief(list(frame.condition)))
    if whole.side.nunique() > 1 or not columns:
        columns.append(list(frame.side))
    if "how" in frame.columns and frame.how.nunique() > 1:
        columns.append(["" if how == ways(comparison)[0] else how for how in frame.how])
    return [_joined([str(part) for part in parts if part]) for parts in zip(*columns, strict=True)]


def _joined(parts: list[str], length: int = 44) -> str:
    """In one line: what is too long is cut, the longest part first, so that the others stay whole."""
    while len(" · ".join(parts)) > length and max(map(len, parts)) > 8:
        longest = max(range(len(parts)), key=lambda at: len(parts[at]))
        over = len(" · ".join(parts)) - length
        parts[longest] = short(parts[longest], max(8, (len(parts[longest]) - over) // 2 * 2))
    return short(" · ".join(parts), length)


def _brief(conditions: list[str]) -> list[str]:
    """What tells conditions apart: without what all of them share, and without the groups of settings,
    ``batch_size=2`` for ``data.batch_size=2``, where that is enough.
    """
    parts = [condition.split() for condition in conditions]
    shared = set.intersection(*map(set, parts)) if len(set(conditions)) > 1 else set()
    different = [" ".join(part for part in of_one if part not in shared) for of_one in parts]
    brief = [re.sub(r"[\w.]+\.(?=\w+=)", "", condition) for condition in different]
    for candidate in (brief, different):
        if len(set(candidate)) == len(set(conditions)) and all(candidate):
            return candidate
    return conditions


def _titles(conditions: list[str]) -> list[str]:
    """Of panels."""
    return [heading(text) for text in _brief(conditions)]


def heading(text: str) -> str:
    """Of a panel: up to two lines."""
    return "\n".join(short(line, 24) for line in _wrapped(text))


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(text, 24, break_long_words=False, break_on_hyphens=False) or [""]
    return lines if len(lines) < 3 else [lines[0], " ".join(lines[1:])]


def _axis(setting: str) -> str:
    return _AXES.get(setting, setting)


def _logarithmic(across: Sequence[float], along: Sequence[float]) -> str:
    if plot_style.spans_octaves(across) and plot_style.spans_octaves(along):
        return " Both axes are logarithmic."
    if plot_style.spans_octaves(across):
        return " The axis of the values is logarithmic."
    return " The horizontal axis is logarithmic." if plot_style.spans_octaves(along) else ""


def _hollow(comparison: Comparison) -> str:
    first, *others = ways(comparison)
    return f" Filled markers: {first}; hollow ones: {', '.join(others)}." if others else ""


def _unsaid(comparison: Comparison, frame: pd.DataFrame) -> str:
    """What :func:`_labels` leaves out."""
    first, *others = ways(comparison)
    if frame.how.nunique() > 1:
        return f" Rows that do not say how they were run: {first}." if (frame.how == first).any() else ""
    return f" All as {frame.how.iloc[0]}." if others else ""


def _left_out(there: int, shown: int, what: str) -> str:
    return f" Not shown: {plural(there - shown, what)} more." if there > shown else ""


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain_name(text: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text)
