"""The number that sides are compared by, as it is in ``result.json`` and as it is shown."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from syncbn.study.compare.runs.run_reader import Run
from syncbn.training.errors import SettingError

ACCURACY = re.compile(r"(?:^|/)acc(?:uracy)?(?:_(\w+))?$")
MORE_IS_BETTER = re.compile(
    r"(^|[/_])(acc|accuracy|f1|auc|auroc|precision|recall|iou|miou|map|dice|psnr|images_per_second)"
)
# Half the width of what counts as no difference. For errors it is the protocols' (0.75 points: the paired differences
# of small networks on a test of some hundred images have a standard deviation of about that); else a share of the mean.
MARGIN_POINTS = 0.75
MARGIN_SHARE = 0.05
SETS = {"precise": "test error with population statistics", "val": "validation error"}


@dataclass(frozen=True)
class Metric:
    """What the sides are compared by.

    Attributes:
        name: in ``result.json``, ``test/acc`` say.
        label: for people: "test error" where the name is that of an accuracy, which is shown as an error in percent.
        unit: "%" or "".
        better: "lower" or "higher", of the number that is shown.
        difference_unit: of a difference: "points" for percent, else "".
    """

    name: str
    label: str
    unit: str
    better: str
    difference_unit: str


def choose(name: str, runs: Sequence[Run]) -> Metric:
    """The metric of this name, found in at least one of the runs.

    An accuracy, a name that ends in ``acc`` with values from 0 to 1, is shown as an error in percent.

    Raises:
        SettingError: no run has it; it names what there is.
    """
    values = [value for run in runs if math.isfinite(value := run.number(name))]
    if not any(name in run.numbers() for run in runs):
        there = sorted({each for run in runs for each in run.numbers() if "/" in each})
        if not there:
            raise SettingError("--metric", name, f"no run has finished with a result; {_how_many(runs)}")
        raise SettingError("--metric", name, f"no run has it; use one of {', '.join(there)}")
    match = ACCURACY.search(name)
    if match and all(0 <= value <= 1 for value in values):
        label = SETS.get(name.partition("/")[0], "test error" if name.startswith("test/") else f"error by {name}")
        label += f", {match[1]}" if match[1] else ""
        return Metric(name, label, "%", "lower", "points")
    label = name.replace("/", " ").replace("_", " ")
    return Metric(name, label, "", "higher" if MORE_IS_BETTER.search(name) else "lower", "")


def shown(metric: Metric, run: Run) -> float:
    """A run's value as it is shown; NaN where there is none."""
    value = run.number(metric.name)
    return 100 * (1 - value) if metric.unit == "%" else value


def resolution(metric: Metric, values: Sequence[float]) -> float:
    """What two values may differ by and be the same: metrics are single precision numbers."""
    return 1e-6 * (100 if metric.unit == "%" else max(map(abs, values), default=0.0))


def margin_of(metric: Metric, asked: float | None, baseline: Sequence[float]) -> float:
    """Half the width of what counts as no difference.

    Args:
        metric: what is compared.
        asked: by the user, or None.
        baseline: the baseline's values in a condition.

    Raises:
        SettingError: it is not a number above 0.
    """
    if asked is not None:
        if not 0 < asked < math.inf:
            raise SettingError("--margin", asked, f"use a number above 0, in {metric.difference_unit or 'the metric'}")
        return asked
    return MARGIN_POINTS if metric.unit == "%" else MARGIN_SHARE * abs(sum(baseline) / max(len(baseline), 1))


def _how_many(runs: Sequence[Run]) -> str:
    counts = {run.status: sum(other.status == run.status for other in runs) for run in runs}
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
