"""How plots look: colours that the colour-blind tell apart, a shape for each, axes, and figures as SVG and PNG.

Figures are five inches wide with text of 11 points, so that they can be read on a page of 400 pixels.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

WIDTH = 5.0  # inches
INK, MUTED, RULE, PAPER = "#1b1f24", "#636b76", "#d9dde3", "#fffffe"
# Okabe & Ito 2008, without yellow, which is too pale on white. The baseline has the ink; the order is the one in which
# the first few are farthest apart for every kind of colour blindness.
COLOURS = (INK, "#0072b2", "#d55e00", "#56b4e9", "#e69f00", "#cc79a7", "#009e73")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 11,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text
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
    """Within it figures are made and saved, whatever the user's own settings of matplotlib."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)  # type: ignore[arg-type]  # its stubs want literal names
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # the browser has it
        yield


@dataclass(frozen=True)
class Look:
    """How a series is drawn.

    Attributes:
        label: what it is called.
        colour: of line and marker.
        marker: its shape.
        filled: a hollow one is the same side, run in another way.
    """

    label: str
    colour: str
    marker: str
    filled: bool

    @property
    def face(self) -> str:
        """The colour inside the marker."""
        return self.colour if self.filled else PAPER

    @property
    def handle(self) -> Line2D:
        """Its line in a legend."""
        return Line2D(
            [],
            [],
            color=self.colour,
            marker=self.marker,
            markerfacecolor=self.face,
            markersize=7,
            label=self.label,
        )


def new(
    height: float, rows: int = 1, columns: int = 1, *, shared: bool = False, by_row: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of that height in inches, and its axes, which may share their scales, the vertical one row by row."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")  # pyplot, which would keep it, is not told
    axes = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey="row" if by_row else shared)
    return figure, list(axes.flat)


def short(text: str, length: int = 34) -> str:
    """Without its middle where it is too long: labels differ at their ends. Printable, and not hidden by matplotlib."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(text) > length:
        text = f"{text[: length // 2 - 1]}…{text[len(text) - length // 2 :]}"
    return f"\u200b{text}" if text.startswith("_") else text  # matplotlib hides labels that begin with it


def legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Above the axes, in as many columns as fit."""
    widest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = max(1, min(len(handles), 44 // (widest + 6)))
    figure.legend(
        handles, [str(h.get_label()) for h in handles], loc="outside upper left", ncols=columns, columnspacing=1.2
    )


def spans_octaves(values: Iterable[float]) -> bool:
    """Whether a logarithmic axis shows them better."""
    finite = [value for value in values if np.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) >= 8 * min(finite)


def plain(value: float) -> str:
    """A number on an axis."""
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}").replace("-", "−")


def set_scale(axis: Axis, scale: str, **options: Any) -> None:
    """``set_xscale`` or ``set_yscale`` of the plot that ``axis`` belongs to."""
    change = axis.axes.set_xscale if isinstance(axis, XAxis) else axis.axes.set_yscale
    change(scale, **options)


def logarithmic(axis: Axis, values: Iterable[float]) -> None:
    """With plain numbers at the ticks, two or more of them."""
    finite = [value for value in values if np.isfinite(value) and value > 0]
    decades = np.log10(max(finite) / min(finite))
    set_scale(axis, "log", nonpositive="clip")
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def at_these(axis: Axis, values: Sequence[float]) -> None:
    """Ticks where the data is, 2, 4, 8, 16 say, and a logarithmic axis where they span octaves."""
    if spans_octaves(values):
        set_scale(axis, "log", base=2)
    if len(values) <= 8:
        axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def rows(axes: Axes, labels: Sequence[str], notes: Sequence[str] = ()) -> None:
    """A row for each label, from the top; the label stands above what is drawn at y = 0, 1, ..., a note at its right.

    So that long labels leave the width to the data.
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


def height_of_rows(count: int) -> float:
    """Inches."""
    return 0.54 * count


def svg(figure: Figure, path: Path) -> None:
    """As a file of its own; the same figure gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def png(figure: Figure, path: Path) -> None:
    """For Markdown and W&B: 1,000 pixels wide."""
    figure.savefig(path, format="png", dpi=1000 / WIDTH, metadata={"Software": None})


def inline(path: Path, label: str, prefix: str = "") -> str:
    """An SVG file as part of a page, with the page's colours, light or dark, and identifiers of its own.

    Args:
        path: of what :func:`svg` wrote.
        label: for those who cannot see it; already escaped.
        prefix: of identifiers, where the page has several plots of one name.
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
    # Within style alone: an attribute takes no var().
    return re.sub(r'style="[^"]*"', lambda found: _themed(found[0]), text)


def _themed(declarations: str) -> str:
    for colour, variable in _THEMED.items():
        declarations = declarations.replace(colour, variable)
    return declarations
