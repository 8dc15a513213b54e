"""The common parts of all plots: colour-blind safe colours, figures, legends, error bars, and files.

Figures are five inches wide with text of 11 points, so that they are readable on a page of 400 pixels. Scales and ticks
are in :mod:`syncbn.study.report.plots.plot_scales`.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from syncbn.training.atomic_write import unlinked

WIDTH, ROW = 5.0, 0.54  # inches: width of a figure, and height of one of :func:`rows`
Fill = Literal["full", "none", "left", "bottom"]  # of markers
INK, MUTED, RULE, PAPER = "#1b1f24", "#636b76", "#d9dde3", "#fffffe"
# Okabe & Ito 2008, without yellow, which is too pale on white. The baseline has the ink. The order is such that the
# first few colours differ most for every kind of colour blindness.
COLOURS = (INK, "#0072b2", "#d55e00", "#56b4e9", "#e69f00", "#cc79a7", "#009e73", "#7f4f24")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FILLS: tuple[Fill, ...] = ("full", "none", "left", "bottom")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1, 1.2)), (0, (6, 1.2, 1, 1.2)))
BETTER, WORSE = "#0072b2", "#d55e00"
_THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}
_STYLE: dict[str, Any] = {
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",  # included in matplotlib, so the same on all machines
    "font.size": 11,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text is not converted to paths
    "text.color": INK,
    "text.parse_math": False,  # a label may have a dollar sign
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 11,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 11,
}


@contextmanager
def style() -> Iterator[None]:
    """A context in which figures are created and saved independently of the user's matplotlib settings."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)  # type: ignore[arg-type]  # the stubs require literal names
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # browsers have the glyph
        yield


@dataclass(frozen=True)
class Plot:
    """One figure and the name of its files. Without values the figure is None, and the caption has the reason."""

    name: str
    title: str
    caption: str
    figure: Figure | None = None


@dataclass(frozen=True)
class Look:
    """How a series is drawn: its label in the legend, and the style of its line and markers."""

    label: str
    colour: str
    marker: str
    fill: Fill = "full"
    dashes: Any = "-"

    @classmethod
    def of(cls, label: str, at: int, variant: int = 0) -> "Look":
        """The look with colour and marker number ``at``. A variant has another fill and other dashes."""
        which = variant % len(FILLS)
        return cls(label, COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)], FILLS[which], DASHES[which])

    @property
    def filled(self) -> bool:
        """Whether the marker is completely filled."""
        return self.fill == "full"

    @property
    def style(self) -> dict[str, Any]:
        """Keyword arguments of a line with such markers."""
        hollow = self.fill == "none"
        return {
            "color": self.colour,
            "marker": self.marker,
            "fillstyle": "full" if hollow else self.fill,
            "markerfacecolor": PAPER if hollow else self.colour,
            "markerfacecoloralt": PAPER,
        }

    @property
    def handle(self) -> Line2D:
        """The entry in a legend."""
        return Line2D([], [], **self.style, markersize=7, label=self.label)


def new(
    height: float, rows: int = 1, columns: int = 1, *, shared: bool = False, by_row: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of ``height`` inches and its axes. They can share scales; with ``by_row``, vertical ones within rows."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")  # pyplot would keep a reference to the figure
    axes = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey="row" if by_row else shared)
    return figure, list(axes.flat)


def panels(count: int, height: float, *, shared: bool = False, by_row: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with up to two panels in a row of ``height`` inches; returns only the axes with a panel."""
    columns = min(count, 2)
    lines = -(-count // columns)
    figure, axes = new(1.0 + height * lines, lines, columns, shared=shared, by_row=by_row)
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, axes[:count]


def short(text: str, length: int = 34) -> str:
    """Replaces the middle of a long label by an ellipsis, because labels differ at their ends. Makes it printable."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(text) > length:
        text = f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"
    return f"\u200b{text}" if text.startswith("_") else text  # matplotlib hides labels that begin with it


def legend(
    figure: Figure,
    handles: Sequence[Line2D],
    place: Literal["outside upper left", "outside lower left"] = "outside upper left",
) -> None:
    """Adds a legend above or below the axes, on one line if it fits, else in as many columns as fit."""
    labels = [str(handle.get_label()) for handle in handles]
    in_line = sum(map(len, labels)) + 8 * len(labels) <= 60
    columns = len(labels) if in_line else max(1, 44 // (max(map(len, labels)) + 6))
    figure.legend(handles, labels, loc=place, ncols=columns, columnspacing=1.2, handlelength=2.6)


def intervals(
    axes: Axes,
    at: ArrayLike,
    values: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    look: Look,
    *,
    upright: bool = True,
    size: float = 8,
    **options: Any,
) -> None:
    """Draws markers with error bars from ``low`` to ``high``; NaN draws no bar.

    Args:
        axes, look: of markers and bars.
        at: positions of the markers on the horizontal axis if ``upright``, else on the vertical axis.
        values, low, high: of the markers and bars, on the other axis.
        upright: whether bars are vertical.
        size: of markers, in points.
        options: for ``Axes.errorbar``. Without a ``linestyle`` the markers are not joined.
    """
    at, values, low, high = (np.atleast_1d(np.asarray(each, float)) for each in (at, values, low, high))
    x, y, bar = (at, values, "yerr") if upright else (values, at, "xerr")
    options = look.style | {bar: np.abs([low - values, high - values]), "linestyle": "none"} | options
    axes.errorbar(x, y, markersize=size, zorder=3, **options)


def band(axes: Axes, x: ArrayLike, mean: ArrayLike, low: ArrayLike, high: ArrayLike, look: Look, every: Any) -> None:
    """Draws a line with a band from ``low`` to ``high``. ``every`` is ``markevery`` of the markers."""
    axes.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
    axes.plot(x, mean, **look.style, linestyle=look.dashes, markersize=5.5, markevery=every, zorder=3)


def level(axes: Axes, value: float, *, upright: bool = False, width: float = 0.8) -> None:
    """Draws a grey reference line at a value."""
    (axes.axvline if upright else axes.axhline)(value, color=MUTED, linewidth=width, zorder=1)


def finite(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows with a finite number in the column. The cast is for empty frames, whose columns have no numeric type."""
    return frame[np.isfinite(frame[column].astype(float))]


def rows(axes: Axes, labels: Sequence[str], notes: Sequence[str] = ()) -> None:
    """Sets up one row for each label at y = 0, 1, ... from the top. The label is above the row, the note at its right.

    Labels above the rows leave the full width to the data.
    """
    axes.set_ylim(len(labels) - 0.55, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    across = axes.get_yaxis_transform()
    for at, label in enumerate(labels):
        axes.text(0, at - 0.22, label, transform=across, ha="left", va="bottom")
    for at, note in enumerate(notes):
        axes.text(1, at - 0.22, note, transform=across, ha="right", va="bottom", color=MUTED)


def save(plots: Iterable[Plot], directory: Path) -> None:
    """Writes ``NAME.png``, 1,000 pixels wide, and ``NAME.svg``. Equal figures produce identical files."""
    for plot in plots:
        if plot.figure is not None:
            paths = {kind: unlinked(directory / f"{plot.name}.{kind}") for kind in ("png", "svg")}
            plot.figure.savefig(paths["png"], dpi=1000 / WIDTH, metadata={"Software": None})
            with mpl.rc_context({"svg.hashsalt": plot.name}):
                plot.figure.savefig(paths["svg"], metadata={"Date": None, "Creator": None})


def inline(path: Path, label: str, prefix: str = "") -> str:
    """An SVG file that :func:`save` wrote as an element of a page, with the page's light or dark colours.

    The label is for screen readers, and already escaped. The prefix makes identifiers unique on a page with several
    plots of the same name.
    """
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)  # would style the page
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    prefix += path.stem
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    # Only within style attributes: other attributes do not support var().
    colours = re.compile("|".join(_THEMED))
    return re.sub(r'style="[^"]*"', lambda style: colours.sub(lambda colour: _THEMED[colour[0]], style[0]), text)
