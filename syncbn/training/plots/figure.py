"""The style of the pictures, and how they are written."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from syncbn.training.atomic_write import replacing
from syncbn.training.console import print_line, printable

if TYPE_CHECKING:  # matplotlib takes half a second to import, which only the process that draws should pay
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
INK, MUTED, GRID = "#1f2328", "#6b7280", "#e5e7eb"
BLUE, ORANGE, GREEN, RED = "#2f6fb5", "#d9730d", "#2e8b57", "#c0392b"
STYLE: dict[str, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # names of metrics and classes may contain $
    "figure.facecolor": "white",
}


class Margins(NamedTuple):
    """Inches around and between the axes of a figure."""

    left: float = 0.65
    right: float = 0.2
    top: float = 0.85
    bottom: float = 0.5
    across: float = 0.65
    down: float = 0.75


PAGE = Margins()


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults with the style of the pictures, whatever the user's matplotlibrc says."""
    import matplotlib as mpl

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of the font cache, which is built once
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)  # type: ignore[arg-type]  # it wants literal names
        yield


def new(
    width: float, height: float, rows: int = 1, columns: int = 1, *, margins: Margins = PAGE
) -> "tuple[Figure, list[Axes]]":
    """A figure with ``rows`` x ``columns`` axes of this size in inches, in the order of reading.

    The figure does not belong to pyplot, which would keep it, choose a backend and open windows. The margins are fixed:
    matplotlib's constrained layout draws everything twice.
    """
    from matplotlib.figure import Figure

    wide = margins.left + columns * width + (columns - 1) * margins.across + margins.right
    high = margins.top + rows * height + (rows - 1) * margins.down + margins.bottom
    figure = Figure(figsize=(wide, high))
    figure.subplots_adjust(
        left=margins.left / wide,
        right=1 - margins.right / wide,
        bottom=margins.bottom / high,
        top=1 - margins.top / high,
        wspace=margins.across / width,
        hspace=margins.down / height,
    )
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def title(figure: "Figure", text: str) -> None:
    """A title at the left edge."""
    figure.text(0.15 / figure.get_figwidth(), 1 - 0.13 / figure.get_figheight(), text, fontsize=10.5, va="top")


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG atomically. A character that the font lacks is drawn as a box, and is not reported for each name."""
    with replacing(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        figure.savefig(draft, format="png", dpi=DPI, pil_kwargs={"compress_level": 3})


def attempt(name: str, draw: Callable[[], object]) -> None:
    """Draw; a picture that cannot be drawn or written is reported in one line, and the run continues."""
    try:
        draw()
    except Exception as error:  # of matplotlib, for values that nobody expected, or of a full disk
        about = " ".join(f"{type(error).__name__}: {error}".split())
        print_line(f"warning: {name} was not written ({about}); plots=false turns pictures off", error=True)


def shown(text: object, longest: int = 60) -> str:
    """A name as one line of text that a font has, without control characters; the middle of a long one is left out."""
    line = printable(str(text).encode("utf-8", "replace").decode("utf-8"))
    line = re.sub(r"\s+", " ", line)
    if len(line) <= longest:
        return line
    end = (longest - 1) // 2
    return f"{line[: longest - 1 - end]}…{line[-end:]}"
