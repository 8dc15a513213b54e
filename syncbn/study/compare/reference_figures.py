"""Compares published or expected figures with our measurements."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from syncbn.study.compare.layout import Layout
from syncbn.study.compare.reference_spec import Expected, parse
from syncbn.study.compare.runs import labels
from syncbn.study.compare.runs.metric import Metric, resolution

COLUMNS = ["condition", "what", "published", "ours", "agrees", "source"]


def beside(
    expected: Sequence[Mapping[str, Any]],
    layout: Layout,
    metric: Metric,
    means: pd.DataFrame,
    effects: pd.DataFrame,
    cost: pd.DataFrame,
) -> pd.DataFrame:
    """The table ``Comparison.expected``.

    Our figure agrees if its 95 % interval, widened by the ``tolerance``, contains the published figure. With too few
    runs for an interval, it agrees if its distance to the published figure is within the tolerance.

    Args:
        expected: entries with the keys of :class:`syncbn.study.compare.reference_spec.Expected`.
        layout: sides and conditions.
        metric, means, effects, cost: as in :class:`syncbn.study.compare.comparison.Comparison`.

    Raises:
        SettingError: an entry is invalid.
    """
    rows = []
    for each in parse(expected):
        if each.metric not in ("", metric.name):
            continue
        matching = [
            condition
            for condition in layout.conditions
            if all(layout.condition_rows[condition].get(name) == value for name, value in each.where.items())
        ]
        for condition in matching:
            if each.at_most is not None:
                rows.append(_ratio_row(each, condition, layout, metric, cost))
            else:
                rows.append(_figure_row(each, condition, metric, means, effects))
        if not matching:
            at = " ".join(labels.assignment(name, value) for name, value in each.where.items())
            rows.append(_table_row(each, at, metric, "not run", "not comparable"))
    return pd.DataFrame(rows, columns=COLUMNS)


def disagreements(table: pd.DataFrame) -> list[str]:
    """One line for each published figure with which ours does not agree."""
    return [
        f"{row['what']}{' at ' * bool(row['condition'])}{row['condition']}: {row['ours']} does not agree with the "
        f"expected {row['published']} ({row['source']})"
        for row in table[table["agrees"] == "no"].to_dict("records")
    ]


def _figure_row(
    each: Expected, condition: str, metric: Metric, means: pd.DataFrame, effects: pd.DataFrame
) -> dict[str, Any]:
    if each.value is not None:
        ours, low, high = _first(means, condition, each.side, "mean")
    else:
        ours, low, high = _difference(effects, means, condition, each.side, each.baseline or "")
    if math.isnan(ours):
        return _table_row(each, condition, metric, "not run", "not comparable")
    published = _figure(each)
    if each.tolerance is None and math.isnan(low):
        agrees = "not comparable"
    else:
        within = (each.tolerance or 0.0) + resolution(metric, [ours])
        least, most = (ours, ours) if math.isnan(low) else (low, high)
        agrees = "yes" if least - within <= published <= most + within else "no"
    interval = "" if math.isnan(low) else f" [{_number(each, low)}, {_number(each, high)}]"
    return _table_row(each, condition, metric, f"{_number(each, ours)}{interval}{_unit(each, metric)}", agrees)


def _ratio_row(each: Expected, condition: str, layout: Layout, metric: Metric, cost: pd.DataFrame) -> dict[str, Any]:
    here = cost[(cost["condition"] == condition) & (cost["side"] == each.side)].dropna(subset=["ratio"])
    if here.empty or each.baseline != layout.baseline:
        return _table_row(each, condition, metric, "not run", "not comparable")
    ratio = float(here.sort_values("pairs", ascending=False)["ratio"].iloc[0])
    return _table_row(each, condition, metric, f"{ratio:.3g} times", "yes" if ratio <= _figure(each) else "no")


def _table_row(each: Expected, condition: str, metric: Metric, ours: str, agrees: str) -> dict[str, Any]:
    published = _number(each, _figure(each))
    if each.tolerance is not None:
        published += f" ± {each.tolerance:g}"
    published = f"at most {published} times" if each.at_most is not None else f"{published}{_unit(each, metric)}"
    texts = {"what": each.what, "published": published, "ours": ours}
    return {"condition": condition, **texts, "agrees": agrees, "source": each.source}


def _figure(each: Expected) -> float:
    return float(next(number for number in (each.value, each.difference, each.at_most) if number is not None))


def _first(frame: pd.DataFrame, condition: str, side: str, name: str) -> tuple[float, float, float]:
    """A figure and its interval. If runs of several places exist, the place with the most runs counts."""
    rows = frame[(frame["condition"] == condition) & (frame["side"] == side)].sort_values(
        "n", ascending=False, kind="stable"
    )
    middle, low, high = (math.nan if rows.empty else float(rows[column].iloc[0]) for column in (name, "low", "high"))
    return middle, low, high


def _difference(
    effects: pd.DataFrame, means: pd.DataFrame, condition: str, side: str, baseline: str
) -> tuple[float, float, float]:
    """The difference of two sides with its interval. If neither side is the baseline: the difference of the means."""
    others = set(effects[effects["condition"] == condition]["side"])
    rest = {*means["side"]} - others
    if side in others and baseline in rest:
        return _first(effects, condition, side, "difference")
    if baseline in others and side in rest:
        middle, low, high = _first(effects, condition, baseline, "difference")
        return -middle, -high, -low
    ours, theirs = (_first(means, condition, each, "mean")[0] for each in (side, baseline))
    return ours - theirs, math.nan, math.nan


def _number(each: Expected, value: float) -> str:
    return f"{value:+.3g}" if each.difference is not None else f"{value:.3g}"


def _unit(each: Expected, metric: Metric) -> str:
    unit = metric.difference_unit if each.difference is not None else metric.unit
    return f" {unit}" if unit else ""
