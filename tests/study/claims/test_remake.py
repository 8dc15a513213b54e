"""Tests that a page on claims is made again from its tables, without the runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from syncbn.study.claims.report import page, stored
from syncbn.study.claims.report.remake import remake
from syncbn.training.errors import SettingError
from tests.study.claims.conftest import PUBLISHED
from tests.study.support import claim_results
from tests.study.support.page_reader import files, flat, markdown_page


@pytest.fixture(scope="module")
def page_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a page with two claims, whose plots are drawn quickly."""
    directory, nine = tmp_path_factory.mktemp("two"), claim_results.all_nine()
    page.write([nine[1], nine[7]], "Two claims", "Do they hold?", directory)
    return directory


def with_tables(source: Path, directory: Path) -> Path:
    """A directory with only the tables of a page."""
    shutil.copytree(source / "tables", directory / "tables")
    return directory


def test_a_page_made_again_is_the_same_to_the_byte(page_of_two: Path, tmp_path: Path) -> None:
    made = remake(with_tables(page_of_two, tmp_path))
    assert made == tmp_path / "report.html"
    assert files(tmp_path) == files(page_of_two)


def test_the_published_page_is_made_from_its_tables(published: Path) -> None:
    """Tables are unchanged, and the text is the same."""
    made, there = files(published), files(PUBLISHED)
    for name in [name for name in there if name.startswith("tables/")] + ["report.md"]:
        assert made[name] == there[name], name
    assert {Path(name).stem for name in there if name.startswith("plots/")} == {
        Path(name).stem for name in made if name.startswith("plots/")
    }


def test_a_number_in_a_table_is_the_number_on_the_page(page_of_two: Path, tmp_path: Path) -> None:
    table = with_tables(page_of_two, tmp_path) / "tables" / "cases.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(",-2.125,", ",-2.9,"), encoding="utf-8")
    remake(tmp_path)
    assert "−2.9 points [−3.6 to −0.6]" in flat(markdown_page(tmp_path).text)


def test_every_field_of_a_finding_is_read_back(tmp_path: Path) -> None:
    nine = claim_results.all_nine()
    about = stored.Stored("A title", "A question", "claim", "scipy 1", nine)
    stored.write(about, tmp_path)
    back = stored.read(tmp_path)
    assert replace(back, findings=[]) == replace(about, findings=[])
    for one, other in zip(nine, back.findings, strict=True):
        verdicts = {side: one.verdicts.get(side, "not asked") for side in one.sides}
        for rows in ("rows", "versus"):
            assert list(map(repr, getattr(other, rows))) == list(map(repr, getattr(one, rows)))
        for plot, again in zip(one.plots, other.plots, strict=True):
            assert replace(again, frame=plot.frame) == plot
            numbers = plot.frame.assign(x=plot.frame.x.astype(again.frame.x.dtype))
            assert again.frame.equals(numbers.astype(again.frame.dtypes))
        rest = {"rows": [], "versus": [], "plots": []}
        assert replace(other, **rest) == replace(one, verdicts=verdicts, **rest)


def test_unusual_letters_survive(tmp_path: Path) -> None:
    """A name of a run that the locale cannot show, line breaks, and quotes."""
    odd = '\udcff, "quoted"; 50 % | *x*'
    row = claim_results.row("a", "sync", "yes", when=odd, note="two\nlines")
    one = claim_results.finding("x", 1, odd, rows=[row], verdicts={"sync": odd}, problems=[odd], source=odd)
    page.write([one], "A title", "", tmp_path)
    before = files(tmp_path)
    for name in ("report.md", "report.html"):
        (tmp_path / name).unlink()
    remake(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("claims.json", lambda text: None),
        ("claims.json", lambda text: text[: len(text) // 2]),
        ("claims.json", lambda text: json.dumps({"claims": []})),
        ("cases.csv", lambda text: None),
        ("cases.csv", lambda text: text.replace("value_low", "value_lov")),
        ("cases.csv", lambda text: text.replace(",8,", ",eight,")),
        ("verdicts.csv", lambda text: text.partition("\n")[0]),
        ("plots.csv", lambda text: ""),
    ],
)
def test_missing_and_damaged_tables_are_one_error(page_of_two: Path, tmp_path: Path, name: str, change: "type") -> None:
    path = with_tables(page_of_two, tmp_path) / "tables" / name
    text = change(path.read_text(encoding="utf-8"))
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match="the tables of a page on claims cannot be read") as caught:
        remake(tmp_path)
    assert caught.value.setting == str(tmp_path / "tables")
    assert "\n" not in str(caught.value)
