"""Draws README's figures from the committed tables of two studies: ``python docs/figures/error_by_samples.py``."""

import re
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes

from syncbn.study.report.plots import plot_style

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
TABLES = {
    "error_by_samples": RESULTS / "small_batch" / "fixed_step-test-acc" / "tables" / "means.csv",
    "error_by_shared_samples": RESULTS / "normalization_batch" / "sweep-test-acc" / "tables" / "means.csv",
}
SIDES = {"local": "per device", "sync": "synchronized", "group_norm": "group norm"}
LABELS = {"local": (2.15, 92), "sync": (8.4, 1.12), "group_norm": (9.2, 4.5)}  # where the name of a line stands


def line(axes: Axes, rows: pd.DataFrame, colour: str) -> None:
    """Draw the mean over seeds, with its 95 % interval, which ends at 0.1 and 100 %."""
    rows = rows.sort_values("at")
    low, high = (rows[name].clip(0.1, 100) for name in ("low", "high"))
    axes.plot(rows["at"], rows["mean"], color=colour, marker="o", markersize=5)
    axes.fill_between(rows["at"], low, high, color=colour, alpha=0.15, linewidth=0)


def logarithmic(axes: Axes, samples: list[int], label: str) -> None:
    """Give both axes a log scale."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(samples, [str(each) for each in samples])
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"])
    axes.minorticks_off()
    axes.set_ylim(1, 130)
    axes.set_xlabel(label)
    axes.set_ylabel("test error")


def error_by_samples(axes: Axes, means: pd.DataFrame) -> None:
    """Draw one line a side."""
    means = means[means.how == "1 process for 2 devices"]
    for (side, label), colour in zip(SIDES.items(), plot_style.COLOURS, strict=False):
        line(axes, means[means.side == side], colour)
        axes.text(*LABELS[side], label, color=colour, fontweight="bold")
    logarithmic(axes, [2, 4, 8, 16], "samples on each of two devices")


def error_by_shared_samples(axes: Axes, means: pd.DataFrame) -> None:
    """Draw one line; its side is the number of samples that share statistics."""
    means = means[means.how == "1 process for 2 devices"].assign(at=means.side.astype(int))
    line(axes, means, plot_style.COLOURS[1])
    logarithmic(axes, [2, 4, 8, 16, 32, 64], "samples that share statistics")


def main(directory: Path = HERE) -> None:
    """Write each figure into the directory, as SVG and PNG."""
    for draw in (error_by_samples, error_by_shared_samples):
        with plot_style.style(), mpl.rc_context({"svg.hashsalt": draw.__name__}):  # its ids are the same every time
            figure, (axes,) = plot_style.panels(1, 3.0)
            draw(axes, pd.read_csv(TABLES[draw.__name__]))
            figure.savefig(directory / f"{draw.__name__}.png", dpi=160)
            path = directory / f"{draw.__name__}.svg"
            figure.savefig(path, metadata={"Date": None})
            path.write_text(re.sub(r" +$", "", path.read_text("utf-8"), flags=re.MULTILINE), "utf-8")


if __name__ == "__main__":
    main()
