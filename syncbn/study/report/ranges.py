"""Intervals cut to the range of the metric: an error is between 0 and 100 %. The CSV files have the whole ones."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from syncbn.study.compare.comparison import Comparison
from syncbn.study.format import MISSING, rounded


def mean_interval(c: Comparison, row: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of a row of ``c.means``, cut where the metric ends."""
    return _within(row["low"], c), _within(row["high"], c)


def difference_interval(c: Comparison, row: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of a row of ``c.effects``, cut where the side's metric would leave its range.

    The side's metric is the baseline's mean plus the difference.
    """
    means = c.means
    here = means[(means.condition == row["condition"]) & (means.side == c.baseline) & (means.how == row["how"])]
    low, high = row["low"], row["high"]
    if here.empty or not isfinite(low):
        return low, high
    base = float(here["mean"].iloc[0])
    low = low if base + low >= c.metric.least else c.metric.least - base
    high = high if base + high <= c.metric.greatest else c.metric.greatest - base
    return low, high


def rounded_interval(
    ends: tuple[float, float], row: Mapping[str, Any], *, sign: bool = False, between: str = " to "
) -> str:
    """Both ends with the decimals that the row's whole interval supports; a dash if there is none."""
    if not all(map(isfinite, ends)):
        return MISSING
    return between.join(rounded(end, row["low"], row["high"], sign=sign) for end in ends)


def _within(value: float, c: Comparison) -> float:
    return value if not isfinite(value) else min(max(value, c.metric.least), c.metric.greatest)
