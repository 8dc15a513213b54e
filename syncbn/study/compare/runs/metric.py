"""The metric by which sides are compared: its name in ``result.json``, its label, unit and margin."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from syncbn.study.compare.runs.run_reader import Run
from syncbn.training.errors import SettingError

ACCURACY = re.compile(r"(?:^|/)acc(?:uracy)?(?:_(\w+))?$")
SHARE = re.compile(
    r"(^|[/_])(acc|accuracy|top\d+|f1|auc|auroc|precision|recall|iou|miou|map|dice)|^leak/(together|spread)$"
)  # from 0 to 1
MORE_IS_BETTER = re.compile(
    r"(^|[/_])(acc|accuracy|top\d+|f1|kappa|auc|auroc|precision|recall|iou|miou|map|dice|psnr|images_per_second)"
    r"|^leak/(together|spread)$"
)
# The equivalence margin, half the width of "no difference". For errors it is 0.75 points, as in the protocols: paired
# differences of small networks on some hundred test images have about this standard deviation. For other metrics it is
# a share of the mean.
MARGIN_POINTS = 0.75
MARGIN_SHARE = 0.05
OVERLAP = re.compile(r"(?:^|[/_])m?iou$")  # shown in percent, as papers do
PROBES = {"probe": "of a linear probe", "nn": "by nearest neighbours"}  # after "acc_"
LABELS = {  # of the meter of the leak
    "leak/together": "pretext accuracy with both views on one device",
    "leak/spread": "pretext accuracy with the views spread",
    "leak/difference": "leak",
}
WORDS = {"iou": "IoU", "miou": "mIoU"}
SETS = {"precise": "test error with population statistics", "val": "validation error"}


@dataclass(frozen=True)
class Metric:
    """The metric by which sides are compared. An accuracy is shown as an error in percent, an IoU in percent.

    Attributes:
        name: in ``result.json``, for example ``test/acc``.
        label: for display; "test error" for ``test/acc``.
        unit: "%" or "".
        better: "lower" or "higher", for the number as shown.
        difference_unit: the unit of differences: "points" for percent, else "".
        least, greatest: the ends of the metric's range. Intervals are not shown beyond it.
    """

    name: str
    label: str
    unit: str
    better: str
    difference_unit: str
    least: float = -math.inf
    greatest: float = math.inf


def choose(name: str, runs: Sequence[Run]) -> Metric:
    """The metric of this name, which at least one run must have.

    An accuracy is shown as an error in percent, and an intersection over union in percent. A metric is one of them if
    its name matches ``ACCURACY`` or ``OVERLAP`` and all its values are between 0 and 1.

    Raises:
        SettingError: no run has the metric. The hint lists the available metrics.
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
        label += f" {PROBES.get(match[1], f'on {match[1]}')}" if match[1] else ""
        return Metric(name, label, "%", "lower", "points", 0.0, 100.0)
    label = LABELS.get(name, " ".join(WORDS.get(word, word) for word in re.split("[/_]", name)))
    if OVERLAP.search(name) and all(0 <= value <= 1 for value in values):
        return Metric(name, label, "%", "higher", "points", 0.0, 100.0)
    better = "higher" if MORE_IS_BETTER.search(name) else "lower"
    ends = (0.0, 1.0) if SHARE.search(name) and all(0 <= value <= 1 for value in values) else (-math.inf, math.inf)
    return Metric(name, label, "", better, "", *ends)


def shown(metric: Metric, run: Run) -> float:
    """A run's value as it is shown; NaN if the run does not have the metric."""
    value = run.number(metric.name)
    if metric.unit != "%":
        return value
    return 100 * (1 - value if metric.better == "lower" else value)


def resolution(metric: Metric, values: Sequence[float]) -> float:
    """The difference up to which two values count as equal: metrics have single precision."""
    return 1e-6 * (100 if metric.unit == "%" else max(map(abs, values), default=0.0))


def margin_of(metric: Metric, asked: float | None, baseline: Sequence[float]) -> float:
    """The equivalence margin: the one that the user asked for, else the default for the baseline's values.

    Raises:
        SettingError: the user's margin is not a number above 0.
    """
    if asked is not None:
        if not 0 < asked < math.inf:
            raise SettingError("--margin", asked, f"use a number above 0, in {metric.difference_unit or 'the metric'}")
        return asked
    return MARGIN_POINTS if metric.unit == "%" else MARGIN_SHARE * abs(sum(baseline) / max(len(baseline), 1))


def _how_many(runs: Sequence[Run]) -> str:
    counts = Counter(run.status for run in runs)
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
