"""README and the documentation are in short sentences, and without the words that we replace."""

import re
from pathlib import Path

import pytest

from tests.support.markdown_pages import REPO, pages, prose, sentences

LONGEST = 25  # words in a sentence
REPORTS = REPO / "docs/results"  # written by the program
PAGES = [
    page
    for page in pages()
    if page in (REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "slurm/README.md", REPO / "benchmarks/README.md")
    or (REPO / "docs" in page.parents and REPORTS not in page.parents)
]
REPLACED = {
    r"(?<!error )(?<!commit )\bmessages?\b|\bexchang(e|es|ed|ing)\b": "all-reduce",
    r"\b(comes?|came|coming) back\b|\b(goes|went) on\b": "resume, continue",
    r"\b(a|have a|take a) look\b|\blook(s|ed|ing)? at\b": "check, inspect",
    r"\b(says?|said|saying|told|tells)\b": "report, log, print, name",
    r"\bwhat came out\b|\bcame out\b": "result",
    r"\bby (itself|themselves)\b": "automatically",
    r"\bof (its|their|one's|somebody's) own\b|\bsomebody's own\b": "its own; custom, user-defined",
    r"\bstands? for\b|\bthat is none\b": "represents, is not",
    r"\bhangs? on\b": "depends on",
    r"\band so on\b|\band the like\b": "name the cases",
    r"\bwhoever\b|\bwhatever stands\b": "name the actor",
}


def replaced_words(text: str) -> list[str]:
    """The words of a text that have a plainer one, each with that one."""
    found = []
    for pattern, plainer in REPLACED.items():
        found += [
            f"{hit[0]} -> {plainer}" for hit in re.finditer(rf".{{0,30}}(?:{pattern}).{{0,30}}", text, re.IGNORECASE)
        ]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_sentences_are_short_and_words_plain(page: Path) -> None:
    assert [each for each in sentences(page) if len(each.split()) > LONGEST] == []
    assert replaced_words(prose(page)) == []


def test_readme_fits_on_three_screens() -> None:
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_a_long_sentence_and_a_replaced_word_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    many = " ".join(["many"] * 20)
    lines = [
        f"# {many} {many}\n",
        f"One `code {many}` and a [link {many}](https://example.org/) (Wu et al. 2018). A {many}",
        f"and {many} more. An error message.\n",
        f"| {many} the log says it |\n|---|\n| x |\n\n```\nit says {many} {many}\n```\n",
    ]
    page.write_text("\n".join(lines), encoding="utf-8")
    assert [len(each.split()) for each in sentences(page)] == [29, 43, 3]
    assert [each.rpartition(" -> ")[2] for each in replaced_words(prose(page))] == ["report, log, print, name"]
