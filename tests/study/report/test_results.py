"""Tests that the committed pages in ``docs/results`` say what their tables say."""

import json
from pathlib import Path

import pytest

from syncbn.study.report import answer, read
from syncbn.study.report.blocks import escape
from syncbn.study.report.comparison_page import matrix_markdown
from syncbn.study.report.symbol_matrix import legend, symbol_matrix

RESULTS = Path(__file__).parents[3] / "docs/results"
STUDIES = sorted(path.parent for path in RESULTS.glob("*/parts.json"))


def test_there_are_four() -> None:
    assert [path.name for path in STUDIES] == ["group_size", "normalization_batch", "shards", "small_batch"]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_the_answers_are_those_of_the_tables(study: Path) -> None:
    """``syncbn report docs/results`` writes the pages again."""
    parts = json.loads((study / "parts.json").read_text(encoding="utf-8"))["parts"]
    whole = (study / "report.md").read_text(encoding="utf-8")
    for part in parts:
        comparison, page = read.read(study / part), (study / part / "report.md").read_text(encoding="utf-8")
        said = [f"**{escape(answer.sentence(comparison))}**", matrix_markdown(symbol_matrix(comparison))]
        said += [escape(line) for line in (*legend(comparison), answer.cost(comparison), *comparison.problems)]
        assert all(words in text for words in said for text in (page, whole))


def test_the_overview_says_what_the_first_page_of_each_study_says() -> None:
    overview = (RESULTS / "README.md").read_text(encoding="utf-8")
    for study in STUDIES:
        first = json.loads((study / "parts.json").read_text(encoding="utf-8"))["parts"][0]
        assert f"| {answer.sentence(read.read(study / first))} |" in overview
    rows = [
        row for path in RESULTS.glob("*/*-test-acc/tables") for row in read.read(path.parent).confirmations.itertuples()
    ]
    same = sum(abs(row.difference) < 1e-6 for row in rows)
    most = max(abs(row.difference) for row in rows)
    assert f"{len(rows)} runs were done both ways. {same} of them" in " ".join(overview.split())
    assert f"up to {round(most * 6.29)} of the 629 test images ({most:.2f} points)" in overview
