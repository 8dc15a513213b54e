"""``find``: evaluates the claim of a study from the run directories."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from syncbn.study.cells import Cell, seeds
from syncbn.study.claims import hypothesis_tests, plot_data, rule, verdict
from syncbn.study.claims.readings import Results
from syncbn.study.claims.result import CaseLabel, Finding, Published, Row
from syncbn.study.claims.rule import Case, Figure, Reading
from syncbn.study.compare import caveats
from syncbn.study.compare.compare import ALPHA
from syncbn.study.format import plural


def find(study: Mapping[str, Any], cells: Sequence[Cell], root: Path, command: str = "") -> Finding:
    """Evaluates the claim of a study. Missing and failed runs are reported as problems, not as errors.

    ``command`` repeats the runs and writes the page.

    Raises:
        SettingError: the claim's rule is invalid.
    """
    claim, results = rule.parse(study), Results(cells, root)
    cases = list(claim.cases.values())
    rows, versus = hypothesis_tests.rows(cases, results), hypothesis_tests.versus(cases, results)
    whole = [run for run in results.runs.values() if not run.trouble]
    doubts = [line for case in cases for line in _reasons_for_missing_pairs(case, results)]
    left_out = [line for case in cases if (line := _left_out(case, results, str(study["budget"])))]
    return Finding(
        study=str(study["name"]),
        number=claim.number,
        text=claim.text,
        article=claim.article,
        method=claim.method,
        baseline=claim.baseline,
        sides=list(claim.sides),
        seeds=max(seeds(study, part) for part in study["parts"].values()),
        alpha=ALPHA,
        rows=rows,
        verdicts={
            side: verdict.verdict([row for row in rows if row.side == side and row.says != verdict.MEASURED])
            for side in claim.sides
        },
        versus=versus,
        worse=verdict.sentences(versus, verdict.WORSE),
        published=[beside(each, rows) for each in claim.literature],
        plots=[plot_data.plot(each, results) for each in claim.plots],
        runs=len(cells),
        finished=len(whole),
        diverged=sum(run.number("diverged") == 1 for run in whole),
        better=verdict.sentences(versus, verdict.BETTER),
        sharing=verdict.sharing(versus),
        problems=[*results.problems(), *dict.fromkeys(doubts), *caveats.versions(whole)],
        command=command,
        source=claim.source,
        left_out=left_out,
        labels={case.name: CaseLabel(case.short, *results.limits_of_reading(case.reading)) for case in cases},
    )


def _reasons_for_missing_pairs(case: Case, results: Results) -> list[str]:
    """Lines on why a case has fewer pairs than seeds, for reasons other than the budget and failed or missing runs."""
    lines = []
    for reading, side in _readings(case):
        for condition in reading.asked:
            if results.is_planned(reading.part, condition, side):
                lines.append(_missing_metric(case, reading, condition, side, results))
    for side in case.sides:
        found = hypothesis_tests.pairs(case, (case.reading, side), (case.against, case.against_side), results)
        lines += [f"{case.name}, {side}: {why}: not counted" for why in found.left_out]
    return list(filter(None, lines))


def _left_out(case: Case, results: Results, budget: str) -> str:
    """A line on runs of a case that the budget leaves out; "" if it has all."""
    left_out = dict[str, list[str]]()  # conditions by side
    for reading, side in _readings(case):
        for condition in reading.asked:
            if not results.is_planned(reading.part, condition, side):
                left_out.setdefault(side, []).append(condition)
    if not left_out:
        return ""
    # A part without conditions has one condition, with the name "".
    which = "; ".join(f"{side} at {', '.join(names)}" if any(names) else side for side, names in left_out.items())
    return f"{case.name}: budget {budget} leaves out what it asks for, so it is not run ({which})"


def _readings(case: Case) -> list[tuple[Reading, str]]:
    """All readings of a case, each with its side."""
    return [*((case.reading, side) for side in case.sides), (case.against, case.against_side)]


def _missing_metric(case: Case, reading: Reading, condition: str, side: str, results: Results) -> str:
    """A line on runs that do not have the metric; "" if all have it."""
    runs = [results.run(reading.part, condition, side, seed) for seed in results.seeds(reading.part)]
    found = [run for run in runs if run]
    without = sum(reading.metric not in run.numbers() for run in found)
    where = f"{reading.part}/{condition}/{side}"
    line = f"{case.name}: {without} of {plural(len(found), 'run')} of {where} have no {reading.metric}"
    return line if without else ""


def beside(figure: Figure, rows: Sequence[Row]) -> Published:
    """A published figure with our corresponding number, and whether the two agree."""
    ours, agrees = "not measured", ""
    row = next((row for row in rows if (row.case, row.side) == (figure.case, figure.side)), None)
    if row is not None and row.n:
        value, low, high = {
            "value": (row.value, row.value_low, row.value_high),
            "other": (row.other, row.other_low, row.other_high),
            "effect": (row.effect, row.low, row.high),
        }[figure.of]
        unit = ("times" if row.is_ratio else "points" if row.unit == "%" else row.unit, row.unit)[figure.of != "effect"]
        ours = verdict.with_interval(value, low, high, unit)
        if figure.value is not None:
            agrees = _agrees(value, low, high, figure.value, figure.tolerance)
    return Published(figure.what, figure.published, figure.source, ours, agrees)


def _agrees(value: float, low: float, high: float, published: float, tolerance: float) -> str:
    """Returns "yes" if our mean is within the tolerance, "no" if our whole interval is outside of it, else "open"."""
    tolerance += 1e-9 * abs(published)  # rounding: 2.0 has to be within 0.1 of 2.1
    if abs(value - published) <= tolerance:
        return "yes"
    return "no" if low > published + tolerance or high < published - tolerance else "open"
