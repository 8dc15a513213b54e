"""Sides, conditions and numbers of a comparison in words."""

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.paired_tests import is_within
from syncbn.study.format import MISSING, listed, rounded
from syncbn.study.report.plots.plot_labels import brief
from syncbn.study.report.tables import ways

Row = dict[str, Any]

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
    "shuffle": "batch norm with the statistics of each device, of samples shuffled over the devices",
    "ghost": "batch norm with the statistics of parts of a device's batch",
    "group_norm": "group norm",
    "none": "no norm",
}


def axis_head(c: Comparison) -> str:
    """The head of the column of conditions."""
    return WORDS.get(c.axis, (c.axis,))[0] or "condition"


def main_side(c: Comparison) -> str:
    """The first side named sync, else the first one; the last one if the sides are numbers of one setting.

    If the baseline is synchronized itself, it is local.
    """
    if are_numbers(c):
        return c.sides[-1]
    if c.baseline.split()[0] == "sync" and "local" in c.sides:
        return "local"
    return next((side for side in c.sides[1:] if side.split()[0] == "sync"), c.sides[1])


def are_numbers(c: Comparison) -> bool:
    """Whether all sides are numbers: values of one setting."""
    return all(re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", side) for side in c.sides)


def named(c: Comparison, side: str) -> str:
    """The side, with the name of its setting if it is a plain number."""
    return f"{c.factor}={side}" if are_numbers(c) else side


def rows_of(c: Comparison, side: str) -> list[Row]:
    """The effects of a side, one for each condition: of the main way of running, if there are several."""
    rows = c.effects[c.effects.side == side]
    order = {how: at for at, how in enumerate(ways(c))}
    rows = rows.iloc[rows.how.map(order).argsort(kind="stable")].drop_duplicates("condition")
    ordered = rows.sort_values("condition", key=lambda names: names.map(c.conditions.index))
    return [dict(row) for row in ordered.to_dict("records")]


def is_likely(row: Row) -> bool:
    """Whether a difference is undecided although its interval does not contain 0."""
    return bool(row["verdict"] == "undecided" and (row["low"] > 0 or row["high"] < 0))


def is_small(c: Comparison, row: Row) -> bool:
    """Whether a difference is shown, and shown to be within the margin."""
    return row["verdict"] in ("lower", "higher") and is_within(row["p_tost"], c.alpha)


def where_text(c: Comparison, conditions: Sequence[str], whole: bool = True) -> str:
    """``with 2 and 4 samples on each device, ``, or ``with 2 and 4 ``; "" for the only condition."""
    if len(c.conditions) == 1:
        return ""
    if not c.axis:
        labels = dict(zip(c.conditions, condition_labels(c), strict=True))
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
    """``shards=inversion and labels``, ``different inversion and labels``: what all begin with is said once."""
    first, last = min(labels), max(labels)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    start = re.sub(r"[^= ]*$", "", first[:same])
    return start + listed([label.removeprefix(start) for label in labels])


def condition_labels(c: Comparison) -> list[str]:
    """Short labels of the conditions: the values on an axis, words for known settings, else what differs."""
    parts = [each.partition("=") for each in c.conditions]
    name = parts[0][0]
    if name in VALUES and all(part[0] == name and "=" not in part[2] for part in parts):
        null, other = VALUES[name]
        return [null if value == "null" else other.format(value) for _, _, value in parts]
    return [value for _, _, value in parts] if c.axis else brief(c.conditions)


def mean_text(c: Comparison, condition: str, side: str, how: str = "") -> str:
    """The mean of a side, with the decimals that its interval supports."""
    rows = c.means[(c.means.condition == condition) & (c.means.side == side)]
    rows = rows[rows.how == (how or next(iter(_ways_of(c, rows)), ""))]
    if rows.empty:
        return MISSING
    row = rows.iloc[0]
    return rounded(row["mean"], row.low, row.high)


def _ways_of(c: Comparison, rows: pd.DataFrame) -> list[str]:
    return [how for how in ways(c) if (rows.how == how).any()]
