"""States the verdict of a comparison in sentences: the differences, their intervals, and the cost.

``paired_tests.decide`` decides what is stated.
"""

import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import pandas as pd

from syncbn.study.compare.paired_tests import is_within
from syncbn.study.compare.runs.metric import Metric
from syncbn.study.format import plural, span

Row = dict[str, Any]
MINUS = "\N{MINUS SIGN}"
LONG = 4  # at most so many differences or ratios are listed; for more, a sentence states their range
ENOUGH = 3  # pairs from which the range of a time ratio is meaningful; for fewer, the sentence says "only"
WORDS = ("lower", "higher", "no difference", "undecided", "too few pairs")


def verdict(
    factor: str,
    metric: Metric,
    baseline: str,
    sides: Sequence[str],
    effects: pd.DataFrame,
    cost: pd.DataFrame,
    alpha: float,
) -> str:
    """``Comparison.verdict``: one sentence for each side and one on the cost. Intervals are listed if they are few.

    Args:
        factor: its name precedes sides that are plain numbers.
        metric, baseline, sides, effects, cost, alpha: as in :class:`syncbn.study.compare.comparison.Comparison`.
    """
    of = f"{factor} " if all(re.fullmatch(r"[\d.e-]+", side) for side in sides) else ""
    brief = len(effects) > LONG
    sentences = []
    for side in sides[1:]:
        rows = effects[effects["side"] == side].to_dict("records")
        if not rows:
            sentences.append(f"{of}{side} could not be compared with {baseline}.")
            continue
        with_how = len({row["how"] for row in rows}) > 1 and not brief
        alike = groupby(sorted(rows, key=partial(_verdict_key, alpha)), partial(_verdict_key, alpha))
        parts = [_clause(*kind, list(those), metric, with_how, brief) for kind, those in alike]
        sentences.append(f"{of}{side} against {baseline}, {metric.label}: {'; '.join(parts)}.")
    if effects["verdict"].isin(["lower", "higher", "undecided"]).any() and not brief:
        sentences.append("In brackets, 95 % intervals.")
    return " ".join([*sentences, *_cost_sentences(baseline, sides, cost, of)])


def signed(value: float, metric: Metric) -> str:
    """A difference with its sign: points with two decimals, others with three digits; — for NaN."""
    if math.isnan(value):
        return "—"
    return (f"{value:+.2f}" if metric.difference_unit else f"{value:+.3g}").replace("-", MINUS)


def p_value(p: float) -> str:
    """A p value with two digits; — for NaN."""
    if math.isnan(p):
        return "—"
    return "<1e-6" if p < 1e-6 else f"{p:.2g}"


def at(conditions: Sequence[str]) -> str:
    """Labels of conditions, with a common setting named once: ``data.batch_size=2, 4``."""
    names = {condition.partition("=")[0] for condition in conditions}
    if len(names) == 1 and all(condition.count("=") == 1 for condition in conditions):
        return f"{names.pop()}={', '.join(condition.partition('=')[2] for condition in conditions)}"
    return ", ".join(filter(None, conditions))


def _verdict_key(alpha: float, row: Row) -> tuple[int, bool]:
    """The index of the row's verdict in ``WORDS``, and whether the difference is shown to be within the margin."""
    return WORDS.index(row["verdict"]), is_within(row["p_tost"], alpha)


def _clause(number: int, within: bool, rows: list[Row], metric: Metric, with_how: bool, brief: bool) -> str:
    """The part of a sentence on conditions with the same verdict."""
    word, unit = WORDS[number], f" {metric.difference_unit}" if metric.difference_unit else ""
    margin = f"{_margin([row['margin'] for row in rows])}{unit}"
    where = ", ".join(map(_condition_and_how, rows)) if with_how else at([str(row["condition"]) for row in rows])
    where = f" at {where}" if where else ""
    if word == "no difference":
        return f"no difference beyond {margin}{where}"
    if word == "too few pairs":
        return f"too few pairs to say{where}"
    better = f" ({'better' if word == metric.better else 'worse'})" if word in ("lower", "higher") else ""
    if within:
        better += f", by less than {margin}"
    if brief:
        return f"{word}{better}{where}, {_range(rows, metric)}{unit}"
    figures = ", ".join(_figures(row, metric, unit, with_how) for row in rows)
    if word == "undecided":
        return f"undecided, neither a difference nor its absence being shown: {figures}"
    return f"{word}{better}: {figures}"


def _margin(margins: Sequence[float]) -> str:
    """``±0.75``, or ``±0.01 to ±0.021`` if conditions have their own margins."""
    return span(f"±{min(margins):.3g}", f"±{max(margins):.3g}")


def _range(rows: list[Row], metric: Metric) -> str:
    """The range of the rows' differences: ``−57.00 to −3.20``."""
    return span(*(signed(f(row["difference"] for row in rows), metric) for f in (min, max)))


def _figures(row: Row, metric: Metric, unit: str, with_how: bool) -> str:
    low, middle, high = (signed(row[name], metric) for name in ("low", "difference", "high"))
    return f"{middle}{unit} [{low}, {high}]{_at_condition(row, with_how)}"


def _at_condition(row: Row, with_how: bool) -> str:
    where = _condition_and_how(row) if with_how else row["condition"]
    return f" at {where}" if where else ""


def _condition_and_how(row: Row) -> str:
    return " as ".join(part for part in (row["condition"], row["how"]) if part)


def _cost_sentences(baseline: str, sides: Sequence[str], cost: pd.DataFrame, of: str) -> list[str]:
    """A sentence on the time per step."""
    known = cost[cost["side"].isin(sides[1:]) & cost["ratio"].notna()]
    if known.empty:
        return ["What it costs cannot be said: no such runs had a process for each device."] if cost.empty else []
    said = []
    for side in [side for side in sides[1:] if side in set(known["side"])]:
        rows = known[known["side"] == side].to_dict("records")
        with_how = len({row["how"] for row in rows}) > 1
        said.append(f"{side} takes {_ratios(rows, with_how)}")
    return [f"A step with {of}{f'; with {of}'.join(said)} as with {baseline}."]


def _ratios(rows: list[Row], with_how: bool) -> str:
    """``about 1.6 times as long at data.batch_size=2 (3 pairs: 1.45 to 1.81)``; one figure for each condition."""
    if len(rows) > LONG:
        least, most = (_rounded(f(row["ratio"] for row in rows)) for f in (min, max))
        fewest = plural(min(row["pairs"] for row in rows), "pair")
        return f"about {least} to {most} times as long, depending on the condition ({fewest} or more for each)"
    parts: list[str] = []
    for row in rows:
        times = "" if parts else " times as long"
        parts.append(f"about {_rounded(row['ratio'])}{times}{_at_condition(row, with_how)} ({_pairs_and_range(row)})")
    return ", ".join(parts)


def _rounded(ratio: float) -> str:
    """A ratio with two decimals below 1, one decimal below 10, and none above."""
    return f"{ratio:.2f}" if ratio < 0.995 else f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def _pairs_and_range(row: Row) -> str:
    """The number of pairs in a ratio and their range, with "only" if they are few."""
    if row["pairs"] == 1:
        return "1 pair alone"
    few = "only " if row["pairs"] < ENOUGH else ""
    return f"{few}{row['pairs']} pairs: {row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
