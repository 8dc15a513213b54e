"""Tests that the committed pages in ``docs/results`` say what their tables say."""

import json
from pathlib import Path

import pytest

from syncbn.study.report import answer, expectations, read
from syncbn.study.report.blocks import escape
from syncbn.study.report.comparison_page import matrix_markdown
from syncbn.study.report.expectations import Answer
from syncbn.study.report.symbol_matrix import legend, symbol_matrix
from tests.training.support.settled_config import composed

RESULTS = Path(__file__).parents[3] / "docs/results"
PAGES = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*/parts.json"))}
STUDIES = list(PAGES)
EXPECTED = {study: [Answer(**each) for each in page["expected"]] for study, page in PAGES.items() if "expected" in page}


def test_there_are_eight() -> None:
    of_tasks = ["cifar10", "leak", "moco", "segmentation"]
    assert [path.name for path in STUDIES] == sorted(
        [*of_tasks, "group_size", "normalization_batch", "shards", "small_batch"]
    )
    assert [path.name for path in EXPECTED] == of_tasks


@pytest.mark.parametrize("study", EXPECTED, ids=lambda path: path.name)
def test_the_expected_effects_are_those_of_the_study(study: Path) -> None:
    page = (study / "report.md").read_text(encoding="utf-8")
    assert all(escape(expectations.line(each)) in page for each in EXPECTED[study])
    rules = composed(f"+study={study.name}").study.expectations
    assert [each.text for each in EXPECTED[study]] == [rule.text for rule in rules.values()]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_the_answers_are_those_of_the_tables(study: Path) -> None:
    """``syncbn report docs/results`` writes the pages again."""
    parts = PAGES[study]["parts"]
    whole = (study / "report.md").read_text(encoding="utf-8")
    for part in parts:
        comparison, page = read.read(study / part), (study / part / "report.md").read_text(encoding="utf-8")
        said = [f"**{escape(answer.sentence(comparison))}**", matrix_markdown(symbol_matrix(comparison))]
        said += [escape(line) for line in (*legend(comparison), answer.cost(comparison), *comparison.problems)]
        assert all(words in text for words in said for text in (page, whole))


def test_the_overview_says_what_the_first_page_of_each_study_says() -> None:
    overview = (RESULTS / "README.md").read_text(encoding="utf-8")
    for study, page in PAGES.items():
        said = answer.sentence(read.read(study / page["parts"][0]))
        assert f"| {expectations.sentence(EXPECTED[study]) if study in EXPECTED else said} " in overview
    rows = [
        row
        for study, page in PAGES.items()
        for part in page["parts"]
        if study not in EXPECTED and part.endswith("-test-acc")
        for row in read.read(study / part).confirmations.itertuples()
    ]
    same = sum(abs(row.difference) < 1e-6 for row in rows)
    most = max(abs(row.difference) for row in rows)
    assert f"{len(rows)} runs were done both ways. {same} of them" in " ".join(overview.split())
    assert f"up to {round(most * 6.29)} of the 629 test images ({most:.2f} points)" in overview
