"""The matrix of symbols on the first screen of a comparison, and what its symbols mean."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

import pandas as pd

from syncbn.study.compare.comparison import Comparison
from syncbn.study.format import MISSING, probability, rounded, span
from syncbn.study.report.ranges import difference_ends, difference_interval
from syncbn.study.report.tables import margin_text, with_unit, worded_verdict
from syncbn.study.report.wording import (
    SIDES,
    Row,
    are_numbers,
    axis_head,
    condition_labels,
    is_likely,
    is_small,
    main_side,
    mean_text,
    named,
    rows_of,
)

SYMBOLS = {"better": "✓", "worse": "✗", "same": "=", "open": "?"}  # by the tone of a verdict

SMALL = "="  # after the symbol of a difference that is shown to be within the margin


@dataclass(frozen=True)
class Cell:
    """One difference from the baseline: its symbol, its tone (a key of ``SYMBOLS``), its text and its interval."""

    symbol: str
    tone: str
    difference: str
    interval: str = ""

    @property
    def text(self) -> str:
        """All of it on one line: ``✓ −65 [−75, −54]``."""
        return " ".join(filter(None, (self.symbol, self.difference, self.interval)))


@dataclass(frozen=True)
class Matrix:
    """The differences of all sides from the baseline.

    Attributes:
        columns: heads: of the rows' labels, of the baseline's mean, and of each side.
        rows: for each condition its label, the baseline's mean, and a cell for each side. With one condition there is a
            row for each side: its label, its mean, and one cell.
    """

    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]

    @property
    def cells(self) -> list[Cell]:
        """All cells."""
        return [cell for _, _, cells in self.rows for cell in cells]


def symbol_matrix(c: Comparison) -> Matrix:
    """The matrix of symbols; without rows if nothing could be compared."""
    if c.effects.empty:
        return Matrix([], [])
    metric = with_unit(c.metric.label, c.metric.unit)
    difference = with_unit("difference", c.metric.difference_unit)
    if len(c.conditions) == 1:
        condition, sides = c.conditions[0], sorted(c.sides, key=float) if are_numbers(c) else c.sides
        rows = [(named(c, side), mean_text(c, condition, side), _cells(c, condition, [side])) for side in sides]
        return Matrix(["", metric, difference], rows)
    labels = dict(zip(c.conditions, condition_labels(c), strict=True))
    main = main_side(c)
    sides = sorted(c.sides[1:], key=lambda side: side != main)  # the main side is the first to be seen
    rows = [(labels[each], mean_text(c, each, c.baseline), _cells(c, each, sides)) for each in c.conditions]
    return Matrix([axis_head(c), f"{named(c, c.baseline)}: {metric}", *(named(c, side) for side in sides)], rows)


def legend(c: Comparison) -> list[str]:
    """What the symbols mean, and why a difference is undecided, in a line each."""
    shown = symbol_matrix(c).cells
    if not shown:
        return []
    there = {"small" if cell.symbol[1:] == SMALL else cell.tone for cell in shown if "(" not in cell.symbol}
    there |= {cell.tone for cell in shown if cell.symbol[1:] == SMALL}
    better, worse, same, undecided = SYMBOLS.values()
    words = {
        "better": f"{better} better than {named(c, c.baseline)}",
        "worse": f"{worse} worse",
        "small": f"{better}{SMALL} or {worse}{SMALL} by less than {margin_text(c)}",
        "same": f"{same} no difference beyond {margin_text(c)}",
        "open": f"{undecided} undecided",
    }
    unit = f" in {c.metric.difference_unit}" if c.metric.difference_unit else ""
    first = (
        f"{', '.join(words[tone] for tone in words if tone in there)}. Differences from {named(c, c.baseline)}{unit}"
    )
    lines = [f"{first}, {c.metric.better} is better; in brackets, 95 % intervals{_cut(c)}."]
    rows = [row for side in c.sides[1:] for row in rows_of(c, side)]
    likely = [row["p_holm"] for row in rows if is_likely(row)]
    if likely:
        symbols = " ".join(sorted({cell.symbol for cell in shown if "(" in cell.symbol}))
        p = span(probability(min(likely)), probability(max(likely)))
        lines.append(
            f"{symbols} likely, but not shown: the interval excludes 0, but {len(c.effects)} differences"
            f" were tested. Corrected for that (Holm), p is {p}; a difference needs less than {c.alpha:g}."
        )
    others = [int(row["n"]) for row in rows if row["verdict"] == "undecided" and not is_likely(row)]
    if others:
        seeds = span(str(min(others)), str(max(others)))
        lines.append(
            f"{undecided} {seeds} seeds show neither a difference nor its absence. More seeds would narrow the"
            " interval."
        )
    if any(row["verdict"] == "too few pairs" for row in rows):
        lines.append(
            f"{SYMBOLS['open']} without an interval: one pair of runs has none. Run at least 2 seeds, better 8."
        )
    known = [(side, SIDES[side.split()[0]]) for side in c.sides if side and side.split()[0] in SIDES]
    if known:
        lines.append(f"{'; '.join(f'{side}: {meaning}' for side, meaning in known)}.")
    return lines


def _cells(c: Comparison, condition: str, sides: Iterable[str]) -> list[Cell]:
    found = {side: next((row for row in rows_of(c, side) if row["condition"] == condition), None) for side in sides}
    return [Cell("", "", MISSING) if row is None else _cell(c, row) for row in found.values()]


def _cell(c: Comparison, row: Row) -> Cell:
    _, tone = worded_verdict(pd.Series(row), c.metric.better)
    symbol = SYMBOLS[tone] + (SMALL if is_small(c, row) else "")
    if is_likely(row):
        word = "lower" if row["difference"] < 0 else "higher"
        symbol = f"({SYMBOLS['better' if word == c.metric.better else 'worse']})"
    interval = difference_interval(c, row, ", ")
    difference = rounded(row["difference"], row["low"], row["high"], sign=True)
    return Cell(symbol, tone, difference, "" if interval == MISSING else f"[{interval}]")


def _cut(c: Comparison) -> str:
    """A note if an interval is cut."""
    rows = [row for side in c.sides[1:] for row in rows_of(c, side)]
    if not any(difference_ends(c, row) != (row["low"], row["high"]) for row in rows if isfinite(row["low"])):
        return ""
    unit = f" {c.metric.unit}".rstrip()
    return f", cut where the {c.metric.label} would leave {c.metric.least:g} to {c.metric.greatest:g}{unit}"
