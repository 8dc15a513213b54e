"""Intervals cut to the range of the metric: an error is between 0 and 100 %. The CSV files have the whole ones."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from syncbn.study.compare.comparison import Comparison
from syncbn.study.format import cut, rounded_interval


def mean_interval(c: Comparison, row: Mapping[str, Any]) -> str:
    """The interval of a row of ``c.means``, cut where the metric ends."""
    ends = cut(row["low"], row["high"], c.metric.least, c.metric.greatest)
    return rounded_interval(*ends, of=(row["low"], row["high"]))


def difference_interval(c: Comparison, row: Mapping[str, Any], between: str = " to ") -> str:
    """The interval of a row of ``c.effects``, cut as by :func:`difference_ends`."""
    ends = difference_ends(c, row)
    return rounded_interval(*ends, of=(row["low"], row["high"]), sign=True, between=between)


def difference_ends(c: Comparison, row: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of a difference, cut where the side's metric would leave its range.

    The side's metric is the baseline's mean plus the difference.
    """
    means = c.means
    here = means[(means.condition == row["condition"]) & (means.side == c.baseline) & (means.how == row["how"])]
    base = float(here["mean"].iloc[0]) if len(here) else 0.0
    if here.empty or not isfinite(base):
        return row["low"], row["high"]
    return cut(row["low"], row["high"], c.metric.least - base, c.metric.greatest - base)
