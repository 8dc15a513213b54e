"""Plots of the cost of synchronization and of the layers that need it."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from syncbn.study.compare.comparison import Comparison
from syncbn.study.format import share, times
from syncbn.study.report import plot_scales, plot_style
from syncbn.study.report.plot_labels import left_out, row_labels, unsaid
from syncbn.study.report.plot_style import BETTER, INK, PAPER, WORSE, Look, Plot, finite, short

ROWS, LAYERS = 40, 20  # maximum in a figure; the tables have all rows


def cost(comparison: Comparison, looks: Mapping[tuple[str, str], Look]) -> Plot:
    """Plots the time per step relative to the baseline, and the share of the step in collectives."""
    table, title = finite(comparison.cost, "ratio"), "What a step costs"
    if table.empty:
        why = "no runs whose devices are processes can be compared, and one process for several says nothing on cost"
        return Plot("cost", title, f"No plot of the cost: {why}.")
    shown = table.head(ROWS)
    measured = bool(np.isfinite(shown.collectives).any())
    rows = plot_style.height_of_rows(len(shown))
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
    bars = " Bars: the part of a step in which a device sends batch norm's messages, or waits for them."
    caption = (
        f"Time of a training step relative to {comparison.baseline} of the same seed and condition: 2 is twice as long."
        " Markers: geometric mean over seeds; lines: from the least to the greatest. Only runs whose devices are"
        " processes."
        + (bars if measured else " No monitor looked at the share of collectives.")
        + unsaid(comparison, shown)
        + left_out(len(comparison.cost), len(shown), "row")
    )
    return Plot("cost", title, caption, figure)


def layers(comparison: Comparison) -> Plot:
    """Plots the effective batch of each layer: the independent samples to which a device's statistics correspond."""
    table, title = finite(comparison.layers, "effective_batch"), "Which layers need it"
    if table.empty:
        return Plot("layers", title, "No plot of the layers: no run was monitored (statistics.csv).")
    shown = table.head(LAYERS)
    figure, (axes,) = plot_style.new(1.2 + plot_style.height_of_rows(len(shown)))
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
        "How many independent samples the statistics of one device are worth, the neediest layer first. Bars: worth;"
        " black ticks: values per channel that the device has. Hatched orange bars: too few, the layer needs shared"
        " statistics; plain blue: enough. Spread: of the devices' means, as a multiple of what chance alone gives."
        f"{f' All of {table.side.iloc[0]}.' if table.side.nunique() == 1 else ''}"
        f"{' The axis is logarithmic.' if logarithmic else ''}{left_out(len(comparison.layers), len(shown), 'layer')}"
    )
    return Plot("layers", title, caption, figure)
