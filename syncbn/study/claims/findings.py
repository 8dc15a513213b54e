"""From a study's directory to what came of its claim."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from syncbn.study import facts, plan
from syncbn.study.claims import judging, literature, rule, series, verdicts
from syncbn.study.claims.finding import Finding
from syncbn.study.claims.rule import Case, Reading
from syncbn.study.claims.values import Results
from syncbn.study.comparing import ALPHA
from syncbn.study.plan import Cell
from syncbn.study.wording import plural


def find(study: Mapping[str, Any], cells: Sequence[Cell], root: Path, command: str = "") -> Finding:
    """What the runs of a study say of its claim. What is missing is told, and stops nothing.

    Args:
        study: its settings, plain, with ``claim``.
        cells: its runs.
        root: its directory.
        command: what makes the runs and the page again.

    Raises:
        SettingError: the claim cannot be read.
    """
    claim, results = rule.parse(study), Results(cells, root)
    rows, versus = judging.rows(claim.cases, results), judging.versus(claim.cases, results)
    whole = [run for run in results.runs.values() if not run.trouble]
    doubts = [line for case in claim.cases for line in _gaps(case, results, str(study["budget"]))]
    return Finding(
        study=str(study["name"]),
        number=claim.number,
        text=claim.text,
        article=claim.article,
        method=claim.method,
        baseline=claim.baseline,
        sides=list(claim.sides),
        seeds=max(plan.seeds(study, part) for part in study["parts"].values()),
        alpha=ALPHA,
        rows=rows,
        verdicts={
            side: verdicts.verdict([row for row in rows if row.side == side and row.says != judging.MEASURED])
            for side in claim.sides
        },
        versus=versus,
        worse=verdicts.worse(versus),
        published=literature.beside(claim.literature, rows),
        plots=series.plots(str(study["name"]), claim.plots, results),
        runs=len(cells),
        finished=len(whole),
        diverged=sum(run.number("diverged") == 1 for run in whole),
        problems=[*results.problems(), *dict.fromkeys(doubts), *facts.versions(whole)],
        command=command,
    )


def _gaps(case: Case, results: Results, budget: str) -> list[str]:
    """Why a case has fewer pairs than seeds, apart from runs that failed or are missing."""
    lines = []
    read = [*((case.reading, side) for side in case.sides), (case.against, case.against_side)]
    for reading, side in read:
        lines += _unread(case, reading, side, results, budget)
    for side in case.sides:
        found = judging.pairs(case, (case.reading, side), (case.against, case.against_side), results)
        lines += [f"{case.name}, {side}: {why}: not counted" for why in found.left_out]
    return lines


def _unread(case: Case, reading: Reading, side: str, results: Results, budget: str) -> list[str]:
    lines = []
    for condition in reading.conditions:
        where = f"{reading.part}/{condition}/{side}"
        if not results.is_planned(reading.part, condition, side):
            lines.append(f"{case.name}: budget {budget} leaves {where} out, so the case stays open")
            continue
        found = [
            run for seed in results.seeds(reading.part) if (run := results.run(reading.part, condition, side, seed))
        ]
        without = sum(reading.metric not in run.numbers() for run in found)
        if without:
            lines.append(f"{case.name}: {without} of {plural(len(found), 'run')} of {where} have no {reading.metric}")
    return lines
