"""Sorts the columns of ``metrics.csv`` into panels: the training and the validation of one metric share a panel."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LEARNING_RATE = "learning rate"
NO_METRICS = ("step", "epoch")
STAGES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Parts of a test, which are no curves, and measurements of layers, which have files of their own.
LEFT_OUT = ("fit", "precise", "corrupted", "adapted", "clean", "target", "statistics", "gradients", "leak")
PREFIX = re.compile(rf"({'|'.join(STAGES)})([/_.-])(.+)", re.IGNORECASE)
LEAST_LOG = 100.0  # a quantity whose largest value is this many times its smallest has a log scale


@dataclass
class Series:
    """The values of one column, each with its step; values that are not finite are left out."""

    column: str
    label: str  # train, val, test, or what else distinguishes it in its panel
    per_step: bool = False  # of single steps, not of epochs
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    broken_at: int | None = None  # the first step with a NaN or an infinity


@dataclass
class Panel:
    """Series that share a vertical axis."""

    name: str
    series: list[Series]

    @property
    def is_log(self) -> bool:
        """Whether the values span decades, and are no shares: these are compared near 1."""
        values = [value for each in self.series for value in each.values]
        if not values or min(values) <= 0 or max(values) < LEAST_LOG * min(values):
            return False
        return max(values) > 1 or self.name == LEARNING_RATE or re.search("loss|err", self.name, re.I) is not None


def panels(rows: Sequence[Mapping[str, str]]) -> list[Panel]:
    """The panels of a ``metrics.csv``: losses first, then other metrics in the order of the file, then learning rates.

    Args:
        rows: of the file, by column; "" where a row has no value.

    Returns:
        Panels with a curve: one value alone is none, unless it is of a metric that was logged in training too.
    """
    found: dict[str, Panel] = {}
    for column in rows[0] if rows else ():
        if column in NO_METRICS or column.partition("/")[0] in LEFT_OUT:
            continue
        series, name = _series(column, rows)
        panel = found.setdefault(name, Panel(name, []))
        # Groups of parameters mostly have one learning rate.
        repeated = any((each.steps, each.values) == (series.steps, series.values) for each in panel.series)
        if (series.values or series.broken_at is not None) and not (name == LEARNING_RATE and repeated):
            panel.series.append(series)
    kept = [panel for panel in found.values() if any(each.label != "test" for each in panel.series)]
    return sorted(kept, key=lambda each: (each.name == LEARNING_RATE, "loss" not in each.name.lower()))


def epochs_of(rows: Sequence[Mapping[str, str]]) -> tuple[list[int], list[float]]:
    """The steps at which epochs ended, and the number of epochs done by then; both empty below two epochs."""
    ends: dict[float, int] = {}
    for row in rows:
        epoch = _number(row.get("epoch", ""))
        trains = any(value and _split(name)[1] != "test" for name, value in row.items() if name not in NO_METRICS)
        if epoch is not None and epoch == int(epoch) and trains:
            ends[epoch + 1] = max(int(row["step"]), ends.get(epoch + 1, 0))
    done = sorted(ends)
    steps = [ends[each] for each in done]
    rising = all(a < b for a, b in pairwise(steps))
    return ([-1, *steps], [0.0, *done]) if len(done) > 1 and rising else ([], [])


def _series(column: str, rows: Sequence[Mapping[str, str]]) -> tuple[Series, str]:
    name, label, per_step = _split(column)
    series = Series(column, label, per_step)
    for row in rows:
        value = _number(row.get(column, ""))
        if value is None:
            continue
        if math.isfinite(value):
            series.steps.append(int(row["step"]))
            series.values.append(value)
        elif series.broken_at is None:
            series.broken_at = int(row["step"])
    return series, name


def _split(column: str) -> tuple[str, str, bool]:
    """The panel of a column, its label there, and whether it is of single steps."""
    if re.match("lr-|lr$", column):
        return LEARNING_RATE, column.removeprefix("lr-"), False
    base, per_step = re.subn("_step$", "", column)
    base = base.removesuffix("_epoch")
    if found := PREFIX.fullmatch(base):
        return found[3], STAGES[found[1].lower()], bool(per_step)
    return base, "", bool(per_step)


def _number(text: str) -> float | None:
    """The number in a field; None for an empty one, or a value of another kind that a user's code has logged."""
    try:
        return float(text)
    except ValueError:
        return None
