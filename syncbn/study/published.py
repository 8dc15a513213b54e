"""Published or expected figures beside ours."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from syncbn.study import labels
from syncbn.study.comparison import Metric
from syncbn.study.sides import Layout
from syncbn.training.schema import SettingError

KEYS = {"what", "source", "where", "side", "baseline", "difference", "value", "tolerance", "metric"}
COLUMNS = ["condition", "what", "published", "ours", "agrees", "source"]


def beside(
    expected: Sequence[Mapping[str, Any]], layout: Layout, metric: Metric, means: pd.DataFrame, effects: pd.DataFrame
) -> pd.DataFrame:
    """``Comparison.expected``.

    Args:
        expected: each with ``what`` and ``source``, texts; ``where``, settings that tell a condition, ``{}`` for all;
            ``side`` and, for a ``difference`` (side minus it), ``baseline``; a ``difference`` or a ``value``, as the
            metric is shown; ``tolerance``, without which ours agrees where its 95 % interval covers the figure; and
            perhaps the ``metric`` it is about, where it is not about whatever is compared.
        layout: sides and conditions.
        metric: what is compared.
        means: ``Comparison.means``.
        effects: ``Comparison.effects``.

    Raises:
        SettingError: an expectation has other keys, or neither or both of a difference and a value.
    """
    rows = []
    for each in expected:
        if unknown := each.keys() - KEYS:
            raise SettingError(
                f"expected: {', '.join(sorted(unknown))}: there is no such key; use {', '.join(sorted(KEYS))}"
            )
        if ("difference" in each) == ("value" in each) or ("difference" in each and "baseline" not in each):
            raise SettingError(f"expected: {each.get('what')}: give a value of a side, or its difference to a baseline")
        if each.get("metric", metric.name) != metric.name:
            continue
        where = each.get("where") or {}
        matching = [
            condition
            for condition in layout.conditions
            if all(layout.condition_rows[condition].get(name) == value for name, value in where.items())
        ]
        rows += [_row(each, condition, metric, means, effects) for condition in matching]
        if not matching:
            at = " ".join(labels.assignment(name, value) for name, value in where.items())
            rows.append(_line(each, at, metric, "not run", "not comparable"))
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(
    each: Mapping[str, Any], condition: str, metric: Metric, means: pd.DataFrame, effects: pd.DataFrame
) -> dict[str, Any]:
    if "value" in each:
        ours, low, high = _mean(means, condition, each["side"])
    else:
        ours, low, high = _difference(effects, means, condition, each["side"], each["baseline"])
    if math.isnan(ours):
        return _line(each, condition, metric, "not run", "not comparable")
    published = float(each["difference"] if "difference" in each else each["value"])
    tolerance = each.get("tolerance")
    if tolerance is None and math.isnan(low):
        agrees = "not comparable"
    else:
        close = low <= published <= high if tolerance is None else abs(ours - published) <= tolerance
        agrees = "yes" if close else "no"
    interval = "" if math.isnan(low) else f" [{_number(each, low)}, {_number(each, high)}]"
    return _line(each, condition, metric, f"{_number(each, ours)}{interval}{_unit(each, metric)}", agrees)


def _line(each: Mapping[str, Any], condition: str, metric: Metric, ours: str, agrees: str) -> dict[str, Any]:
    published = _number(each, float(each["difference"] if "difference" in each else each["value"]))
    if each.get("tolerance") is not None:
        published += f" ± {each['tolerance']:g}"
    texts = {"what": str(each.get("what", "")), "published": f"{published}{_unit(each, metric)}", "ours": ours}
    return {"condition": condition, **texts, "agrees": agrees, "source": str(each.get("source", ""))}


def _mean(means: pd.DataFrame, condition: str, side: str) -> tuple[float, float, float]:
    """The mean and its interval, from most runs where there are several kinds."""
    rows = means[(means["condition"] == condition) & (means["side"] == side)].sort_values("n", ascending=False)
    if rows.empty:
        return math.nan, math.nan, math.nan
    first = rows.iloc[0]
    return float(first["mean"]), float(first["low"]), float(first["high"])


def _difference(
    effects: pd.DataFrame, means: pd.DataFrame, condition: str, side: str, baseline: str
) -> tuple[float, float, float]:
    """Of two sides, of which either may be the comparison's baseline; of two others, the difference of their means."""
    here = effects[effects["condition"] == condition].sort_values("n", ascending=False)
    known = set(means["side"])
    others = set(here["side"])
    if side in others and baseline not in others and baseline in known:
        first = here[here["side"] == side].iloc[0]
        return float(first["difference"]), float(first["low"]), float(first["high"])
    if baseline in others and side not in others and side in known:
        first = here[here["side"] == baseline].iloc[0]
        return -float(first["difference"]), -float(first["high"]), -float(first["low"])
    return _mean(means, condition, side)[0] - _mean(means, condition, baseline)[0], math.nan, math.nan


def _number(each: Mapping[str, Any], value: float) -> str:
    return f"{value:+.3g}" if "difference" in each else f"{value:.3g}"


def _unit(each: Mapping[str, Any], metric: Metric) -> str:
    unit = metric.difference_unit if "difference" in each else metric.unit
    return f" {unit}" if unit else ""
