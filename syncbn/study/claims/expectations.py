"""Effects that a study expects, with rules written before the runs (``study.expectations``), and their answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from syncbn.study.cells import Cell
from syncbn.study.claims.hypothesis_tests import holm_corrected, one_sided
from syncbn.study.claims.readings import Results
from syncbn.study.claims.section import Number, Section, Text, one_of, read, wrong
from syncbn.study.compare import paired_tests
from syncbn.study.compare.compare import ALPHA
from syncbn.study.compare.runs import metric as metrics
from syncbn.study.compare.runs.run_reader import Run
from syncbn.study.report.expectations import APPEARS, MISSES, NOT_RUN, UNDECIDED, Answer, Measured, in_words
from syncbn.training.errors import SettingError

PLACE = "study.expectations"


class Place(Section):
    """What an effect is compared with; keys that are left out are those of the expectation itself."""

    side: Text = ""
    condition: Text = ""
    metric: Text = ""


class Expectation(Section):
    """An expected effect: how a metric differs between two sides, or between two conditions of a side.

    Attributes:
        text: the effect, a clause: "per-device statistics lose mIoU on four devices".
        part: of the study.
        side: of the part.
        condition: of the part; "" for its only one.
        metric: its name in ``result.json``.
        against: what the metric is compared with, seed by seed.
        expect: "higher" or "lower" than that by at least ``by``; "same": within ``by`` of it; "fails": every run fails,
            with ``error`` in its message, and none of the study's other results depends on that.
        by: in the unit in which the metric is shown (points for errors in percent).
        error: part of the message of a run that fails.
    """

    text: Text
    part: Text
    side: Text
    condition: Text = ""
    metric: Text = ""
    against: Place = Place()
    expect: Literal["higher", "lower", "same", "fails"]
    by: Number = Field(0.0, ge=0)
    error: Text = ""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.expect == "fails" and not self.error:
            raise wrong("error", None, "expect: fails needs a part of the message")
        if self.expect != "fails" and not self.metric:
            raise wrong("metric", None, "it is missing")
        if self.expect == "same" and self.by == 0:
            raise wrong("by", self.by, "expect: same needs a margin above 0")
        return self


@dataclass(frozen=True)
class Tested:
    """An expectation with its paired numbers, and its uncorrected p values: that it appears, and that it does not."""

    rule: Expectation
    found: Measured
    p_yes: float
    p_no: float


def parse(study: Mapping[str, Any]) -> dict[str, Expectation]:
    """Reads and checks the expectations of a study.

    Raises:
        SettingError: a key, part, side or condition does not exist, or a value is invalid. It names the setting.
    """
    found = {
        str(name): read(Expectation, f"{PLACE}.{name}", each)
        for name, each in (study.get("expectations") or {}).items()
    }
    for name, each in found.items():
        place = f"{PLACE}.{name}"
        part = study["parts"][one_of(f"{place}.part", each.part, list(map(str, study["parts"])))]
        there = {kind: [str(key) for key in part.get(kind, {"": []})] for kind in ("sides", "conditions")}
        for where, side, condition in ((place, each.side, each.condition), (f"{place}.against", *of_other(each)[:2])):
            one_of(f"{where}.side", side, there["sides"])
            one_of(f"{where}.condition", condition, there["conditions"])
        if each.expect != "fails" and (each.side, each.condition, each.metric) == of_other(each):
            raise SettingError(
                f"{place}.against", hint="the side is compared with itself; use another side or condition"
            )
    return found


def fails(expectations: Mapping[str, Expectation], cell: Cell) -> str:
    """A part of the message with which a run is expected to fail; "" if it is expected to finish."""
    for each in expectations.values():
        if each.expect == "fails" and (each.part, each.side, each.condition) == (cell.part, cell.side, cell.condition):
            return each.error
    return ""


def answers(study: Mapping[str, Any], cells: Sequence[Cell], root: Path) -> list[Answer]:
    """The answers to all expectations of a study, in order, from its run directories."""
    expectations, results = parse(study), Results(cells, root)
    tested = {name: _test(each, results) for name, each in expectations.items() if each.expect != "fails"}
    corrected = zip(
        *(holm_corrected([getattr(one, name) for one in tested.values()]) for name in ("p_yes", "p_no")), strict=True
    )
    judged = dict(zip(tested, corrected, strict=True))
    return [
        _answer(tested[name], *judged[name]) if name in tested else _failure(each, cells, results)
        for name, each in expectations.items()
    ]


def of_other(each: Expectation) -> tuple[str, str, str]:
    """Side, condition and metric of what an expectation is compared with."""
    other = each.against
    return other.side or each.side, other.condition or each.condition, other.metric or each.metric


def _test(each: Expectation, results: Results) -> Tested:
    metric, other = results.metric(each.metric), of_other(each)
    both = [
        (
            results.value(each.part, each.condition, each.side, seed, each.metric),
            results.value(each.part, other[1], other[0], seed, other[2]),
        )
        for seed in results.seeds(each.part)
    ]
    pairs = [(one, two) for one, two in both if one is not None and two is not None and math.isfinite(one - two)]
    mine, theirs = [one for one, _ in pairs], [two for _, two in pairs]
    differences = [one - two for one, two in pairs]
    low, high = paired_tests.mean_interval(differences)
    found = Measured(
        side=_words(each.side, each.condition),
        other=_words(*other[:2]) + (f", {other[2]}" if other[2] != each.metric else ""),
        value=_mean(mine),
        other_value=_mean(theirs),
        difference=_mean(differences),
        low=low,
        high=high,
        n=len(pairs),
        metric=metric.label,
        unit=metric.unit,
        difference_unit=metric.difference_unit,
    )
    p_yes, p_no = _p_values(each, differences, metrics.resolution(metric, [*mine, *theirs]))
    return Tested(each, found, p_yes, p_no)


def _p_values(each: Expectation, differences: Sequence[float], resolution: float) -> tuple[float, float]:
    """Uncorrected p of "appears" and of "does not appear"; NaN for fewer than two pairs."""
    if each.expect == "same":
        (above_low, below_low), (above_high, below_high) = (
            one_sided(differences, margin, resolution) for margin in (-each.by, each.by)
        )
        return max(above_low, below_high), min(1.0, 2 * min(below_low, above_high))
    if each.expect == "higher":
        return one_sided(differences, each.by, resolution)
    above, below = one_sided(differences, -each.by, resolution)
    return below, above


def _answer(tested: Tested, p_yes: float, p_no: float) -> Answer:
    rule, found = tested.rule, tested.found
    kind = APPEARS if p_yes < ALPHA else MISSES if p_no < ALPHA else UNDECIDED
    unit = f" {found.difference_unit}".rstrip()
    needed = {
        "higher": f"{found.metric} higher by {rule.by:g}{unit} or more",
        "lower": f"{found.metric} lower by {rule.by:g}{unit} or more",
        "same": f"{found.metric} within {rule.by:g}{unit}",
    }[rule.expect]
    if rule.by == 0:
        needed = f"{found.metric} {rule.expect}"
    needed += f", {found.side} against {found.other}"
    if not found.n:
        return Answer(rule.text, NOT_RUN, "", needed)
    return Answer(rule.text, kind, in_words(found), needed)


def _failure(each: Expectation, cells: Sequence[Cell], results: Results) -> Answer:
    mine = [cell for cell in cells if (cell.part, cell.side, cell.condition) == (each.part, each.side, each.condition)]
    runs = [run for cell in mine if (run := results.runs.get(cell.directory))]
    needed = f"every run of {_words(each.side, each.condition)} fails, with: {each.error}"
    if not runs:
        return Answer(each.text, NOT_RUN, "", needed)
    as_expected = sum(is_expected(run, each.error) for run in runs)
    kind = APPEARS if as_expected == len(runs) else MISSES
    return Answer(each.text, kind, f"{as_expected} of {len(runs)} runs failed with: {each.error}", needed)


def is_expected(run: Run, error: str) -> bool:
    """Whether a run has failed with this text in its message."""
    return run.status == "failed" and error in run.trouble


def _words(side: str, condition: str) -> str:
    return f"{side} at {condition}" if condition else side


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
