"""Tests that docs/expected_effects.md has the rules of conf/study, and that these are valid."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from syncbn.study.cells import cells
from syncbn.study.claims import expectations
from syncbn.study.claims.expectations import Expectation
from tests.training.support.settled_config import composed

REPO = Path(__file__).resolve().parents[3]
PAGE = REPO / "docs" / "expected_effects.md"


def studies() -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((REPO / "conf" / "study").glob("*.yaml")):
        study = yaml.safe_load(path.read_text(encoding="utf-8")).get("study") or {}
        if study.get("expectations"):
            found[path.stem] = study
    return found


def row(study: str, rule: Expectation) -> str:
    other_side, other_condition, other_metric = expectations.of_other(rule)
    mine, theirs = (
        f"`{side}` at {condition}" if condition else f"`{side}`"
        for side, condition in ((rule.side, rule.condition), (other_side, other_condition))
    )
    if rule.expect == "fails":
        return f"| {study} | {rule.text} | | {mine} | fails: {rule.error} |"
    theirs += f", `{other_metric}`" if other_metric != rule.metric else ""
    by = f" within {rule.by:g}" if rule.expect == "same" else f" by {rule.by:g}" if rule.by else ""
    return f"| {study} | {rule.text} | `{rule.metric}` | {mine}, against {theirs} | {rule.expect}{by} |"


def test_the_page_has_every_rule_and_no_other() -> None:
    expected = [row(name, rule) for name, study in studies().items() for rule in expectations.parse(study).values()]
    lines = PAGE.read_text(encoding="utf-8").partition("## The rules")[2].splitlines()
    assert [line for line in lines if line.startswith("| ")][1:] == expected, "\n".join(expected)


@pytest.mark.parametrize("name", sorted(studies()))
def test_a_study_says_why_its_thresholds_are_what_they_are(name: str) -> None:
    """A threshold without a reason is arbitrary: the file has a comment above or beside the rules."""
    text = (REPO / "conf" / "study" / f"{name}.yaml").read_text(encoding="utf-8")
    before = text[: text.index("  expectations:")].splitlines()[-1]
    assert before.lstrip().startswith("#")


@pytest.mark.parametrize("name", sorted(studies()))
@pytest.mark.parametrize("budget", ["default", "full"])
def test_a_budget_has_the_runs_that_its_rules_compare(name: str, budget: str, tmp_path: Path) -> None:
    study: Any = OmegaConf.to_container(composed(f"+study={name}", f"study.budget={budget}").study)
    there = {(each.part, each.side, each.condition) for each in cells(study, [], tmp_path)}
    conditions = {part: {condition for of, _, condition in there if of == part} for part in study["parts"]}
    found = expectations.parse(study).values()
    # A budget may leave out a condition, such as the data of the other budget; then nothing of it is claimed.
    judged = [each for each in found if each.condition in conditions[each.part]]
    assert judged or budget == "full"
    for each in judged:
        side, condition, _ = expectations.of_other(each)
        assert {(each.part, each.side, each.condition), (each.part, side, condition)} <= there
