"""The first screen of a comparison: a sentence, a matrix of symbols, what the symbols mean, and a line on the cost."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite, nan
from typing import Any

import pandas as pd

from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.paired_tests import is_within
from syncbn.study.format import MISSING, listed, probability, rounded, span
from syncbn.study.report.plot_labels import brief, first_upper
from syncbn.study.report.tables import margin_text, ways, with_unit, worded_verdict

Row = dict[str, Any]
SYMBOLS = {"better": "✓", "worse": "✗", "same": "=", "open": "?"}  # by the tone of a verdict
# Verdicts, in the order of the sentence. "Likely" is undecided with an interval that does not contain 0.
KINDS = ("lower", "higher", "no difference", "likely lower", "likely higher", "undecided", "too few pairs")
SMALL = "="  # after the symbol of a difference that is shown to be within the margin
MOST_NUMBERS = 4  # at most so many conditions have their numbers in the sentence
# Settings in words: as the head of a column, and as the place where something holds.
WORDS = {
    "data.batch_size": ("samples on each device", "with {} samples on each device"),
    "data.global_batch_size": ("samples over all devices", "with {} samples over all devices"),
    "norm.batch_size": ("samples that share statistics", "with {} samples that share statistics"),
    "norm.group": ("devices that share statistics", "with {} devices that share statistics"),
    "trainer.devices": ("devices", "with {} devices"),
    "optimizer.lr": ("learning rate", "at a learning rate of {}"),
}
# Other values in words, by setting: for null, and for others.
VALUES = {"data.shards": ("the same data", "different {}")}
SIDES = {
    "local": "batch norm with the statistics of each device",
    "local_mean": "the same, evaluated with the running statistics of all devices pooled",
    "sync": "batch norm with statistics that devices share",
    "torch_sync": "the same, by torch's layer",
    "ghost": "batch norm with the statistics of parts of a device's batch",
    "group_norm": "group norm",
    "none": "no norm",
}


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


def sentence(c: Comparison) -> str:
    """The answer in plain words: what the main side changes, and where.

    The main side is the first one named sync, or the last one if the sides are numbers of one setting.
    """
    if _are_numbers(c) and len(c.conditions) == 1 and len(c.effects):
        return _sentence_on_values(c)
    side = _main_side(c)
    rows = _rows(c, side)
    if not rows:
        return f"{_named(c, side)} could not be compared with {_named(c, c.baseline)}."
    kinds = [(kind, list(those)) for kind, those in groupby(sorted(rows, key=_kind), _kind)]
    clauses = [_clause(c, side, kind, those, first=not at) for at, (kind, those) in enumerate(kinds)]
    text = f"{'; '.join(clauses)}."
    return text if "=" in text.split()[0] else first_upper(text)  # a setting stays as it is typed


def cost(c: Comparison) -> str:
    """One line: the time per step of each side relative to the baseline."""
    known = c.cost[(c.cost.side != c.baseline) & c.cost.ratio.notna()]
    if known.empty:
        return "Time per step: not measured, because no paired runs had a process for each device."
    how, conditions = list(dict.fromkeys(known.how)), list(dict.fromkeys(known.condition))
    place = _where(c, conditions).rstrip(", ") if len(conditions) == 1 else "the range over conditions"
    where = ", ".join(filter(None, [*how[:1], place]))
    sides = [(side, known[known.side == side]) for side in c.sides if (known.side == side).any()]
    parts = [f"{_named(c, side)} {_ratio(of_one)}" for side, of_one in sides]
    pairs = span(str(int(known.pairs.min())), str(int(known.pairs.max())))
    runs = f"{pairs} {'pair' if pairs == '1' else 'pairs'} of runs for each"
    spread = ", in brackets the least and the greatest" if len(conditions) == 1 and known.pairs.max() > 1 else ""
    return f"Time per step relative to {_named(c, c.baseline)} ({where}; {runs}{spread}): {', '.join(parts)}."


def brief_cost(c: Comparison) -> str:
    """The time per step of the main side, in a few words; "" if it was not measured."""
    side = _main_side(c)
    known = c.cost[(c.cost.side == side) & c.cost.ratio.notna()]
    return "" if known.empty else f"A step takes {_ratio(known)} as long as with {_named(c, c.baseline)}."


def matrix(c: Comparison) -> Matrix:
    """The matrix of symbols; without rows if nothing could be compared."""
    if c.effects.empty:
        return Matrix([], [])
    metric = with_unit(c.metric.label, c.metric.unit)
    difference = with_unit("difference", c.metric.difference_unit)
    if len(c.conditions) == 1:
        condition, sides = c.conditions[0], sorted(c.sides, key=float) if _are_numbers(c) else c.sides
        rows = [(_named(c, side), _mean(c, condition, side), _cells(c, condition, [side])) for side in sides]
        return Matrix(["", metric, difference], rows)
    labels = dict(zip(c.conditions, _condition_labels(c), strict=True))
    main = _main_side(c)
    sides = sorted(c.sides[1:], key=lambda side: side != main)  # the main side is the first to be seen
    rows = [(labels[each], _mean(c, each, c.baseline), _cells(c, each, sides)) for each in c.conditions]
    return Matrix([axis_head(c), f"{_named(c, c.baseline)}: {metric}", *(_named(c, side) for side in sides)], rows)


def legend(c: Comparison) -> list[str]:
    """What the symbols mean, and why a difference is undecided, in a line each."""
    shown = matrix(c).cells
    if not shown:
        return []
    there = {cell.tone for cell in shown if "(" not in cell.symbol} | {
        "small" for cell in shown if cell.symbol[1:] == SMALL
    }
    better, worse, same, undecided = SYMBOLS.values()
    words = {
        "better": f"{better} better than {_named(c, c.baseline)}",
        "worse": f"{worse} worse",
        "small": f"{better}{SMALL} or {worse}{SMALL} by less than {margin_text(c)}",
        "same": f"{same} no difference beyond {margin_text(c)}",
        "open": f"{undecided} undecided",
    }
    unit = f" in {c.metric.difference_unit}" if c.metric.difference_unit else ""
    first = (
        f"{', '.join(words[tone] for tone in words if tone in there)}. Differences from {_named(c, c.baseline)}{unit}"
    )
    lines = [f"{first}, {c.metric.better} is better; in brackets, 95 % intervals{_cut(c)}."]
    likely = c.effects[[_is_likely(row) for row in c.effects.to_dict("records")]]
    if len(likely):
        symbols = " ".join(sorted({cell.symbol for cell in shown if "(" in cell.symbol}))
        p = span(probability(likely.p_holm.min()), probability(likely.p_holm.max()))
        lines.append(
            f"{symbols} likely, but not shown: the interval excludes 0, but {len(c.effects)} differences"
            f" were tested. Corrected for that (Holm), p is {p}; a difference needs less than {c.alpha:g}."
        )
    others = c.effects[c.effects.verdict == "undecided"].drop(likely.index)
    if len(others):
        seeds = span(str(int(others.n.min())), str(int(others.n.max())))
        lines.append(
            f"{undecided} {seeds} seeds show neither a difference nor its absence. More seeds would narrow the"
            " interval."
        )
    if (c.effects.verdict == "too few pairs").any():
        lines.append(
            f"{SYMBOLS['open']} without an interval: one pair of runs has none. Run at least 2 seeds, better 8."
        )
    known = [(side, SIDES[side.split()[0]]) for side in c.sides if side and side.split()[0] in SIDES]
    if known:
        lines.append(f"{'; '.join(f'{side}: {meaning}' for side, meaning in known)}.")
    return lines


def axis_head(c: Comparison) -> str:
    """The head of the column of conditions."""
    return WORDS.get(c.axis, (c.axis,))[0] or "condition"


def within(value: float, c: Comparison) -> float:
    """A value of the metric, cut to its range."""
    return min(max(value, c.metric.least), c.metric.greatest)


def _main_side(c: Comparison) -> str:
    if _are_numbers(c):
        return c.sides[-1]
    return next((side for side in c.sides[1:] if side.split()[0] == "sync"), c.sides[1])


def _are_numbers(c: Comparison) -> bool:
    return all(re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", side) for side in c.sides)


def _named(c: Comparison, side: str) -> str:
    """The side, with the name of its setting if it is a plain number."""
    return f"{c.factor}={side}" if _are_numbers(c) else side


def _rows(c: Comparison, side: str) -> list[Row]:
    """The effects of a side, one for each condition: of the main way of running, if there are several."""
    rows = c.effects[c.effects.side == side]
    order = {how: at for at, how in enumerate(ways(c))}
    rows = rows.iloc[rows.how.map(order).argsort(kind="stable")].drop_duplicates("condition")
    ordered = rows.sort_values("condition", key=lambda names: names.map(c.conditions.index))
    return [dict(row) for row in ordered.to_dict("records")]


def _sentence_on_values(c: Comparison) -> str:
    """``norm.group 2 and 4 instead of 1 lower the test error from 18.5 to 2.28 and 2.08 %.``"""
    rows = [row for side in sorted(c.sides, key=float) for row in _rows(c, side)]
    clauses: list[str] = []
    for kind, those in groupby(sorted(rows, key=_kind), _kind):
        alike = list(those)
        values, many = listed([row["side"] for row in alike]), "" if len(alike) > 1 else "s"
        who = values if clauses else f"{c.factor} {values} instead of {c.baseline}"
        if KINDS[kind] in ("lower", "higher"):
            verb = ("lower" if KINDS[kind] == "lower" else "raise") + many
            after = listed([_mean(c, row["condition"], row["side"], row["how"]) for row in alike])
            before = _mean(c, alike[0]["condition"], c.baseline, alike[0]["how"])
            clauses.append(f"{who} {verb} the {c.metric.label} from {before} to {after} {c.metric.unit}".rstrip())
        elif KINDS[kind] == "no difference":
            clauses.append(f"{who} make{many} no difference beyond {margin_text(c)}")
        elif KINDS[kind].startswith("likely"):
            word = KINDS[kind].removeprefix("likely ")
            clauses.append(f"with {who} a {word} {c.metric.label} is likely, but not shown")
        else:
            clauses.append(f"{who} {'are' if len(alike) > 1 else 'is'} undecided")
    return f"{'; '.join(clauses)}."


def _kind(row: Row) -> int:
    """The index of the verdict in ``KINDS``."""
    likely = f"likely {'lower' if row['difference'] < 0 else 'higher'}"
    return KINDS.index(likely if _is_likely(row) else row["verdict"])


def _is_likely(row: Row) -> bool:
    """Whether a difference is undecided although its interval does not contain 0."""
    return bool(row["verdict"] == "undecided" and (row["low"] > 0 or row["high"] < 0))


def _clause(c: Comparison, side: str, kind: int, rows: list[Row], *, first: bool) -> str:
    """The part of the sentence on the conditions with one verdict. Only the first one names side and unit."""
    where, it = _where(c, [row["condition"] for row in rows], first), _named(c, side) if first else "it"
    verb = {"lower": "lowers", "higher": "raises"}.get(KINDS[kind])
    if KINDS[kind] == "no difference":
        return f"{where}{it} makes no difference beyond {margin_text(c)}"
    if KINDS[kind].startswith("likely"):
        with_it = f" {c.metric.label} with {it}" if first else f" {c.metric.label}"
        return f"{where}a {KINDS[kind].removeprefix('likely ')}{with_it} is likely, but not shown"
    if not verb:
        few = " (too few pairs of runs)" if KINDS[kind] == "too few pairs" else ""
        return f"{where}it is undecided{f' whether {it} makes a difference' if first else ''}{few}"
    small = f" (by less than {margin_text(c)})" if all(_is_small(c, row) for row in rows) else ""
    if len(rows) > MOST_NUMBERS:
        sizes = sorted(abs(row["difference"]) for row in rows)
        by = span(f"{sizes[0]:.2g}", f"{sizes[-1]:.2g}")
        return f"{where}{it} {verb} the {c.metric.label} by {by} {c.metric.difference_unit}".rstrip() + small
    before, after = (
        listed([_mean(c, row["condition"], each, row["how"]) for row in rows]) for each in (c.baseline, side)
    )
    return f"{where}{it} {verb} the {c.metric.label} from {before} to {after} {c.metric.unit}".rstrip() + small


def _is_small(c: Comparison, row: Row) -> bool:
    """Whether a difference is shown, and shown to be within the margin."""
    return row["verdict"] in ("lower", "higher") and is_within(row["p_tost"], c.alpha)


def _where(c: Comparison, conditions: Sequence[str], whole: bool = True) -> str:
    """``with 2 and 4 samples on each device, ``, or ``with 2 and 4 ``; "" for the only condition."""
    if len(c.conditions) == 1:
        return ""
    if not c.axis:
        labels = dict(zip(c.conditions, _condition_labels(c), strict=True))
        return (
            f"{'at' if '=' in labels[conditions[0]] else 'with'} {_together([labels[each] for each in conditions])}, "
        )
    values = listed([condition.partition("=")[2] for condition in conditions])
    start, _, end = WORDS.get(c.axis, ("", f"at {c.axis}={{}}"))[1].partition("{}")
    if not whole:
        return f"{start}{values} "
    end = end.replace("samples", "sample").replace("devices", "device", 1) if values == "1" else end
    return f"{start}{values}{end}, "


def _together(labels: Sequence[str]) -> str:
    """``shards=inversion and labels``: the name is said once if it is that of all."""
    names = {label.partition("=")[0] for label in labels}
    if len(names) > 1 or any(label.count("=") != 1 for label in labels):
        return listed([label.removeprefix("different ") if at else label for at, label in enumerate(labels)])
    return f"{names.pop()}={listed([label.partition('=')[2] for label in labels])}"


def _condition_labels(c: Comparison) -> list[str]:
    parts = [each.partition("=") for each in c.conditions]
    name = parts[0][0]
    if name in VALUES and all(part[0] == name and "=" not in part[2] for part in parts):
        null, other = VALUES[name]
        return [null if value == "null" else other.format(value) for _, _, value in parts]
    return [value for _, _, value in parts] if c.axis else brief(c.conditions)


def _mean(c: Comparison, condition: str, side: str, how: str = "") -> str:
    """The mean of a side, with the decimals that its interval supports."""
    rows = c.means[(c.means.condition == condition) & (c.means.side == side)]
    rows = rows[rows.how == (how or next(iter(_ways_of(c, rows)), ""))]
    if rows.empty:
        return MISSING
    row = rows.iloc[0]
    return rounded(row["mean"], row.low, row.high)


def _ways_of(c: Comparison, rows: pd.DataFrame) -> list[str]:
    return [how for how in ways(c) if (rows.how == how).any()]


def _cells(c: Comparison, condition: str, sides: Iterable[str]) -> list[Cell]:
    found = {side: next((row for row in _rows(c, side) if row["condition"] == condition), None) for side in sides}
    return [Cell("", "", MISSING) if row is None else _cell(c, row) for row in found.values()]


def _cell(c: Comparison, row: Row) -> Cell:
    _, tone = worded_verdict(pd.Series(row), c.metric.better)
    low, high = _shown_interval(c, row)
    symbol = SYMBOLS[tone] + (SMALL if _is_small(c, row) else "")
    if _is_likely(row):
        word = "lower" if row["difference"] < 0 else "higher"
        symbol = f"({SYMBOLS['better' if word == c.metric.better else 'worse']})"
    ends = [rounded(end, row["low"], row["high"], sign=True) for end in (low, high)]
    difference = rounded(row["difference"], row["low"], row["high"], sign=True)
    return Cell(symbol, tone, difference, f"[{', '.join(ends)}]" if isfinite(low) else "")


def _shown_interval(c: Comparison, row: Row) -> tuple[float, float]:
    """The interval of a difference, cut where the side's metric would leave its range."""
    means = c.means[
        (c.means.condition == row["condition"]) & (c.means.side == c.baseline) & (c.means.how == row["how"])
    ]
    base = float(means["mean"].iloc[0]) if len(means) else nan
    if not isfinite(base) or not isfinite(row["low"]):
        return row["low"], row["high"]
    ends = (within(base + row[end], c) - base for end in ("low", "high"))
    low, high = (
        end if abs(end - row[name]) > 1e-9 else row[name] for end, name in zip(ends, ("low", "high"), strict=True)
    )
    return low, high


def _cut(c: Comparison) -> str:
    """A note if an interval is cut."""
    rows = [row for side in c.sides[1:] for row in _rows(c, side)]
    if not any(_shown_interval(c, row) != (row["low"], row["high"]) for row in rows if isfinite(row["low"])):
        return ""
    unit = f" {c.metric.unit}".rstrip()
    return f", cut where the {c.metric.label} would leave {c.metric.least:g} to {c.metric.greatest:g}{unit}"


def _ratio(rows: pd.DataFrame) -> str:
    """``0.87× (0.83 to 0.89)``; the range over conditions if there are several."""
    if len(rows) == 1:
        row = rows.iloc[0]
        return f"{row.ratio:.2f}×" + (f" ({row.ratio_low:.2f} to {row.ratio_high:.2f})" if row.pairs > 1 else "")
    return f"{span(f'{rows.ratio.min():.2f}', f'{rows.ratio.max():.2f}')}×"
