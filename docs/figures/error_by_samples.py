"""Draws README's figure from the committed table of a study: ``python docs/figures/error_by_samples.py``."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from syncbn.study.report import plot_style

HERE = Path(__file__).parent
TABLE = HERE.parent / "results" / "small_batch" / "fixed_step-test-acc" / "tables" / "means.csv"
SIDES = {"local": "per device", "sync": "synchronized", "group_norm": "group norm"}
LABELS = {"local": (2.15, 92), "sync": (8.4, 1.12), "group_norm": (9.2, 4.5)}  # where the name of a line stands


def draw(axes: Axes, means: pd.DataFrame) -> None:
    """Draws one line a side: the mean over seeds, with its 95 % interval."""
    for (side, label), colour in zip(SIDES.items(), plot_style.COLOURS, strict=False):
        rows = means[means.side == side].sort_values("at")
        axes.plot(rows["at"], rows["mean"], color=colour, marker="o", markersize=5)
        axes.fill_between(rows["at"], rows["low"].clip(lower=0.1), rows["high"], color=colour, alpha=0.15, linewidth=0)
        axes.text(*LABELS[side], label, color=colour, fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"])
    axes.minorticks_off()
    axes.set_ylim(1, 130)
    axes.set_xlabel("samples on each of two devices")
    axes.set_ylabel("test error")


def main() -> None:
    """Write the figure as SVG and PNG beside this file."""
    means = pd.read_csv(TABLE)
    means = means[means.how == "1 process for 2 devices"]
    with plot_style.style():
        figure, (axes,) = plot_style.panels(1, 3.0)
        draw(axes, means)
        figure.savefig(HERE / "error_by_samples.png", dpi=160)
        figure.savefig(HERE / "error_by_samples.svg", metadata={"Date": None})  # the same bytes every time


if __name__ == "__main__":
    main()
