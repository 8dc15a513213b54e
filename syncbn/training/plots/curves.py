"""Draws ``curves.png``: losses, metrics and learning rate of a run over its epochs, from ``metrics.csv``."""

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from syncbn.training.loggers.csv_logger import read
from syncbn.training.plots import figure
from syncbn.training.plots.figure import BLUE, GREEN, MUTED, ORANGE, RED, shown
from syncbn.training.plots.panels import LEARNING_RATE, Panel, Series, epochs_of, panels
from syncbn.training.read_file import DamagedError
from syncbn.training.run_directory import record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "curves.png"
MOST = 12  # panels; metrics.csv has all metrics
COLORS = {"train": BLUE, "val": ORANGE, "test": GREEN}
SINGLE_STEPS, BEST = "train, single steps", "best checkpoint"
SHARED = (*COLORS, SINGLE_STEPS, BEST)  # labels of the legend that all panels share
OTHERS = (BLUE, ORANGE, GREEN, "#7c3aed", "#b45309", "#0e7490")  # of series that belong to no stage


def write_curves(run_dir: Path) -> None:
    """Draw ``curves.png`` of a run, whatever its state; nothing if no metric has been logged in training.

    A problem is reported in one line, and raises no exception.
    """
    figure.attempt(FILE, lambda: _write(run_dir))


def _write(run_dir: Path) -> None:
    rows = read(run_dir / "metrics.csv")
    found = panels(rows)
    if not found:
        return
    settings, axis = _settings(run_dir), _Axis(rows)
    kept, left = found[:MOST], len(found) - MOST
    if left > 0 and found[-1].name == LEARNING_RATE:
        kept[-1] = found[-1]
    columns = {1: 1, 2: 2, 4: 2}.get(len(kept), 3)
    with figure.style():
        picture, axes = figure.new(3.6, 2.2, ceil(len(kept) / columns), columns)
        best, end = _best(rows, settings), float(axis.places([max(int(row["step"]) for row in rows)])[0])
        for panel, place in zip(kept, axes, strict=False):
            _draw(place, panel, axis, best)
            place.set_xlim(0, end * 1.02)
        for place in axes[len(kept) :]:
            place.set_axis_off()
        _legend(picture)
        more = f"{left} more in metrics.csv" if left > 0 else ""
        figure.title(picture, "  ·  ".join(filter(None, (_title(run_dir, settings), more))))
        figure.save(picture, run_dir / FILE)


class _Axis:
    """The horizontal axis: epochs that were done, or optimizer steps where there are fewer than two."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self._steps, self._epochs = epochs_of(rows)
        self.name = "epoch" if self._steps else "step"

    def places(self, steps: list[int]) -> "np.ndarray[Any, Any]":
        """The places of steps, which are counted from 0 and stand where they end."""
        if not self._steps:
            return np.asarray(steps, float) + 1
        inside = np.interp(steps, self._steps, self._epochs)
        # A step after the last whole epoch: at the pace of that epoch.
        pace = (self._epochs[-1] - self._epochs[-2]) / (self._steps[-1] - self._steps[-2])
        later = np.maximum(0, np.asarray(steps) - self._steps[-1])
        return np.asarray(inside + later * pace)


def _draw(axes: "Axes", panel: Panel, axis: _Axis, best: int | None) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    others = [each for each in panel.series if each.label not in COLORS]
    for series in sorted(panel.series, key=_order):
        color = COLORS.get(series.label) or OTHERS[others.index(series) % len(OTHERS)]
        _draw_series(axes, series, axis, color, best)
    broken = [each.broken_at for each in panel.series if each.broken_at is not None]
    if broken:
        place = float(axis.places([min(broken)])[0])
        axes.axvline(place, color=RED, lw=1.2, label=f"not finite from {axis.name} {place:.4g}")
    if best is not None and panel.name != LEARNING_RATE:
        axes.axvline(float(axis.places([best])[0]), color=MUTED, lw=1, ls=(0, (3, 3)), label=BEST)
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_title(shown(panel.name, 44))
    axes.set_xlabel(axis.name)
    handles, labels = axes.get_legend_handles_labels()
    own = [(handle, label) for handle, label in zip(handles, labels, strict=True) if label not in SHARED]
    if own and (panel.name != LEARNING_RATE or len(own) > 1):
        axes.legend(*zip(*own, strict=True), loc="best")


def _legend(picture: "Figure") -> None:
    """One legend for what looks the same in all panels, beside the title."""
    found: dict[str, Any] = {}
    for axes in picture.axes:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [label for label in SHARED if label in found]
    if labels:
        left, top = 0.05 / picture.get_figwidth(), 1 - 0.34 / picture.get_figheight()
        handles = [found[label] for label in labels]
        picture.legend(handles, labels, loc="upper left", bbox_to_anchor=(left, top), ncols=len(labels), borderpad=0.2)


def _order(series: Series) -> tuple[bool, int, str]:
    """The order of the legend: train, val, test, others, and single steps last."""
    stages = list(COLORS)
    return series.per_step, stages.index(series.label) if series.label in stages else len(stages), series.label


def _draw_series(axes: "Axes", series: Series, axis: _Axis, color: str, best: int | None) -> None:
    label = shown(series.label, 30)
    if series.label == "test":  # of the best checkpoint, where there is one
        place = axis.places(series.steps[-1:] if best is None else [best])
        axes.plot(place[: len(series.values)], series.values[-1:], "*", ms=9, color=color, label=label, zorder=4)
    elif series.per_step:
        label = f"{label}, single steps" if label else "single steps"
        axes.plot(
            axis.places(series.steps),
            series.values,
            color=color,
            lw=0.9,
            marker="." if len(series.steps) == 1 else "",
            alpha=0.4,
            label=label,
        )
    else:
        marker = "o" if len(series.steps) <= 40 else ""
        places = axis.places(series.steps)
        axes.plot(places, series.values, color=color, lw=1.6, marker=marker, ms=3, label=label or "_")


def _best(rows: list[dict[str, str]], settings: DictConfig) -> int | None:
    """The step at which the monitored metric was best, which is the step of ``best.ckpt``; None without one."""
    about = OmegaConf.select(settings, "callbacks.checkpoint")
    if not isinstance(about, DictConfig) or not about.get("monitor"):
        return None
    scored = [(float(row[about.monitor]), int(row["step"])) for row in rows if row.get(about.monitor)]
    scored = [(value, step) for value, step in scored if np.isfinite(value)]
    if not scored:
        return None
    return (max if about.get("mode") == "max" else min)(scored, key=lambda each: each[0])[1]  # the first of equal ones


def _settings(run_dir: Path) -> DictConfig:
    try:
        return record.settings(run_dir) or OmegaConf.create()
    except DamagedError:
        return OmegaConf.create()


def _title(run_dir: Path, settings: DictConfig) -> str:
    """The run, its norm, and how many samples share statistics."""
    about = record.read(run_dir, "run")
    name = OmegaConf.select(settings, "norm.name")
    size, devices = OmegaConf.select(settings, "data.batch_size"), settings.get("simulate") or about.get("world_size")
    batch = about.get("normalization_batch")
    parts = [
        shown(about.get("id") or run_dir.name, 40),
        f"norm {name}" if name else "",
        f"{devices} × {size} samples" if size and devices else "",
        f"statistics of {batch}" if batch else "",
    ]
    return "  ·  ".join(filter(None, parts))
