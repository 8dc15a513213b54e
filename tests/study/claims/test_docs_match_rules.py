"""Tests the files of the nine claims: they are valid, and docs/claims.md agrees with them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from syncbn.study.claims import rule

REPO = Path(__file__).parents[3]
CLAIMS = yaml.safe_load((REPO / "conf/study/claims.yaml").read_text(encoding="utf-8"))["study"]["studies"]
PAGE = (REPO / "docs/claims.md").read_text(encoding="utf-8")


def study(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((REPO / f"conf/study/{name}.yaml").read_text(encoding="utf-8"))["study"])


def test_there_are_nine() -> None:
    assert [rule.parse(study(name)).number for name in CLAIMS] == list(range(1, 10))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_page_has_each_case_as_it_is_judged(name: str) -> None:
    asked = study(name)
    claim = rule.parse(asked)
    seeds = ", ".join(str(asked["budgets"][budget]["seeds"]) for budget in ("default", "full"))
    for case in claim.cases.values():
        read = case.reading
        over = read.over + (f" less {read.less}" if read.less else "")
        if read.over in ("worst", "best", "mean", "highest") and asked["claim"]["cases"][case.name].get("conditions"):
            over += f" of {', '.join(read.conditions)}"
        if read.usable is not None:
            over += f" with {read.usable:g} at most"
        what = f"{'magnitude of ' * read.magnitude}`{read.metric}` in {read.part}, {over}"
        against = case.against_side + (f", {case.against.metric}" if case.against.metric != read.metric else "")
        kind = " times" if case.is_ratio else " points" if "/acc" in read.metric else ""
        needed = f"{read.wants}, by {case.at_least:g}{kind}" + (
            "" if case.at_most is None else f", to {case.at_most:g} at most"
        )
        when = case.when + " (measured, not judged)" * (not case.counts)
        row = f"| {claim.number} | {when} | {what} | {', '.join(case.sides)} | {against} | {needed} | {seeds} |"
        assert row in PAGE.splitlines(), row


def test_the_page_has_no_case_besides() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == sum(len(rule.parse(study(name)).cases) for name in CLAIMS)
