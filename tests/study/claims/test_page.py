"""Tests the page on claims: it has each figure of the findings, and the most important results first."""

import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from syncbn.study.claims import page, tables
from syncbn.study.claims.result import Finding, Published, Row, Versus
from tests.study.support import claim_results
from tests.study.support.page_reader import Page, cells, files, flat, html_page, markdown_page

NINE = claim_results.all_nine()
NORMS = ["local", "sync", "group_norm", "local_mean"]
NAN = float("nan")


@pytest.fixture(scope="module")
def html(nine: Path) -> Page:
    return html_page(nine)


@pytest.fixture(scope="module")
def markdown(nine: Path) -> Page:
    return markdown_page(nine)


def test_the_matrix_has_nine_rows_and_a_column_for_each_norm_and_for_sharing(html: Page, markdown: Page) -> None:
    rows = [
        [f"{one.number}. {one.text}", *(one.verdicts.get(norm, "not asked") for norm in NORMS), one.sharing or "—"]
        for one in NINE
    ]
    assert cells(markdown)[0] == [["claim", *(f"{norm}, against none" for norm in NORMS), "sync against local"], *rows]
    assert cells(html)[0][1:] == rows
    assert cells(html)[0][0] == [
        "claim",
        "local per-device statistics, against none",
        "sync synchronized statistics, against none",
        "group_norm group norm, against none",
        "local_mean per-device statistics, running ones averaged, against none",
        "sync against local",
    ]
    beside = [a["data-head"] for _, a in html.tags if "verdict-cell" in str(a.get("class"))]  # on a narrow screen
    assert beside == [*(f"{norm} against none" for norm in NORMS), "sync against local"] * len(NINE)


def test_heads_name_all_that_a_norm_is_judged_against() -> None:
    rows = [claim_results.row("a", "sync", "open", against="local")]
    rows += [claim_results.row("b", "sync", "measured", against="ghost")]
    one = claim_results.finding("x", 1, "X")
    other = claim_results.finding("y", 2, "Y", rows=rows, sides=["sync", "local_mean"])
    assert tables.compared_sides([one, other], "sync") == "none or local"
    assert tables.compared_sides([one, replace(other, baseline="ghost")], "group_norm") == "none"  # not asked
    assert tables.compared_sides([replace(other, baseline="ghost")], "local_mean") == "ghost"


@pytest.mark.parametrize(
    ("words", "shown", "tone"),
    [
        ("worse with small batches", "worse with small batches", "worse"),
        ("better with 2 devices and with 4", "better with 2 devices and with 4", "better"),
        ("better", "better", "better"),
        ("better with outliers; worse with noise", "better with outliers; worse with noise", "partly"),
        ("worse with noise; better with outliers", "worse with noise; better with outliers", "partly"),
        ("no difference", "no difference", "even"),
        ("not decided", "not decided", "open"),
        ("not run", "not run", "open"),
        ("", "—", "unused"),
    ],
)
def test_sharing_has_a_tone_of_its_own(words: str, shown: str, tone: str) -> None:
    assert tables.sharing(claim_results.finding("x", 1, "X", sharing=words)) == (shown, tone)


@pytest.mark.parametrize(
    ("words", "tone"),
    [
        ("holds", "better"),
        ("holds only with sigmoid; not decided with tanh by 8 seeds", "partly"),
        ("does not hold", "worse"),
        ("not decided by 8 seeds", "open"),
        ("not decided by 8 seeds with blur; does not hold with noise", "open"),
        ("not asked", "unused"),
    ],
)
def test_a_verdict_has_a_tone_of_its_own(words: str, tone: str) -> None:
    one = claim_results.finding("x", 1, "X", verdicts={"sync": words})
    assert tables.worded_verdict(one, "sync") == (words, tone)


def test_tones_are_in_the_matrix_and_beside_the_claim(html: Page) -> None:
    tones = [str(a["class"]).split()[-1] for _, a in html.tags if "verdict-cell" in str(a.get("class"))]
    made = [[*(tables.worded_verdict(one, norm)[1] for norm in NORMS), tables.sharing(one)[1]] for one in NINE]
    assert tones == [tone for row in made for tone in row]


def in_brackets(low: str, high: str) -> str:
    return f"[{low} to {high}]".replace("-", "−")


def test_each_case_says_what_the_finding_says(html: Page, markdown: Page) -> None:
    """The format of numbers is implemented independently here."""
    shown = [row for table in cells(html) if table[0][:2] == ["case", "norm"] for row in table[1:]]
    assert shown == [row for table in cells(markdown) if table[0][:2] == ["case", "norm"] for row in table[1:]]
    rows = [row for one in NINE for row in one.rows]
    for row, cell in zip(rows, shown, strict=True):
        assert cell[:3] == [row.when or "—", row.side, row.says]
        pairs = f"{row.n} of 8" if row.n < 8 else "8"
        assert (cell[5], cell[7], cell[11]) == (pairs, row.against, row.what)
        assert row.says != "measured" or cell[9:11] == ["—", "—"]  # of no family
        if row.value != row.value:
            assert [cell[at] for at in (3, 6, 8, 9, 10)] == ["—"] * 5
        elif not row.is_ratio:
            effect = f"{row.effect:+.2f} points".replace("-", "−")
            assert cell[3] == f"{effect} {in_brackets(f'{row.low:+.2f}', f'{row.high:+.2f}')}"
            assert cell[4] == "+1.00 points" + (", and at most 20.00 %" if row.at_most else "")
            assert cell[6] == f"{row.value:.2f} {in_brackets(f'{row.value_low:.2f}', f'{row.value_high:.2f}')}"
            assert cell[8] == f"{row.other:.2f} {in_brackets(f'{row.other_low:.2f}', f'{row.other_high:.2f}')}"
    of_first = ["2.51 times [2.20 to 2.83]", "1.25 times", "8", "40.25 [38.12 to 42.50]", "none"]
    assert shown[0][3:] == [*of_first, "100.5 [90.12 to 110.1]", "0.0012", "1", "steps to 95 %"]
    (far,) = (row for row in shown if row[0] == "with sigmoid")
    assert far[3:5] == ["3.4×10³⁰ times [2.1×10²⁹ to 5.0×10³¹]", "10.00 times"]
    (near,) = (row for row in shown if row[0] == "with ReLU")
    assert (near[3], near[10]) == ("3.4×10⁻⁷ times [1.0×10⁻⁸ to 2.0×10⁻³]", "3.2×10⁻⁷")
    assert sum("at most" in row[4] for row in shown) == sum(row[2] == "measured" for row in shown) == 1
    one = claim_results.finding("x", 1, "X", rows=[claim_results.row("", "sync", "yes", at_most=80.0)])
    assert tables.build(one)["cases"].rows[0][4] == "1.25 times, and at most 80.00"


def test_sync_against_local_and_the_literature_are_beside_each_claim(html: Page, markdown: Page) -> None:
    for shown in (html, markdown):
        versus = [row for table in cells(shown) if table[0][1] == "sync is" for row in table[1:]]
        about = ["±1.00 points", "10", "20.70", "15.32", "2.0×10⁻⁵", "1", "test error, %"]
        assert versus[1] == ["with small batches", "worse", "−5.38 points [−6.58 to −4.17]", *about]
        same = ["1.25 times", "8", "40.25", "39.50", "1", "0.00031", "steps to 95 %"]
        assert versus[0] == ["—", "no difference", "0.98 times [0.91 to 1.06]", *same]
        words = ["no difference", "worse", "not decided", "better (less than what matters)", "worse", "better"]
        assert [row[1] for row in versus] == words
        published = [row for table in cells(shown) if table[0][0] == "what" for row in table[1:]]
        steps = ["steps, without over with batch norm", "2.33 times", "2.51 times", "yes", "Ioffe & Szegedy 2015"]
        assert published == [steps, ["gap", "—", "not measured", "—", "Wu & Johnson 2021"]]


def test_colours_of_sync_against_local_are_for_what_matters() -> None:
    words = ["better", "worse", "no difference", "not decided", "not run"]
    rows = [claim_results.versus(word, word, 1.0, 0.5) for word in words]
    rows += [claim_results.versus(word, word, 0.1, 0.001, is_small=True) for word in words[:2]]
    made = tables.build(claim_results.finding("x", 1, "X", versus=rows))["versus"]
    assert made.tones == ["better", "worse", "open", "open", "open", "open", "open"]
    assert [row[1] for row in made.rows[:5]] == words
    nothing = replace(rows[4], n=0, needed=NAN, p=NAN, p_same=NAN, effect=NAN, low=NAN, high=NAN)
    (shown,) = tables.build(claim_results.finding("x", 1, "X", versus=[nothing]))["versus"].rows
    assert [shown[at] for at in (2, 3, 4, 7, 8)] == ["—", "—", "0", "—", "—"]


KINDS = [("cases", Row, "rows"), ("versus", Versus, "versus"), ("published", Published, "published")]


@pytest.mark.parametrize(("table", "kind", "name"), KINDS)
def test_a_changed_figure_changes_its_table(table: str, kind: type, name: str) -> None:
    (one, *_) = (one for one in NINE if getattr(one, name) and not getattr(getattr(one, name)[0], "is_ratio", False))
    first, *others = getattr(one, name)
    before = tables.build(one)[table]
    for field in fields(kind):
        value = 0.0 if field.name == "at_most" else getattr(first, field.name)  # None, where nothing is asked of it
        other = value + "z" if isinstance(value, str) else not value if isinstance(value, bool) else value + 1
        after = tables.build(replace(one, **{name: [replace(first, **{field.name: other}), *others]}))[table]
        seen = field.name not in ("case", "unit")  # a case is known by its words, the unit is in those of the metric
        assert not seen or after.rows[0] != before.rows[0], field.name
        assert after.rows[1:] == before.rows[1:]


def test_where_sync_does_worse_is_said_with_a_link_to_the_claim(nine: Path, html: Page, markdown: Page) -> None:
    for shown in (html, markdown):
        text = flat(shown.text)
        for one in NINE:
            assert all(f"{one.number}. {one.text}: {line}" in text for line in [*one.worse, *one.better])
        linked = [a["href"] for tag, a in shown.tags if tag == "a" and str(a.get("href")).startswith("#")]
        assert linked == [*(f"#{one.study}" for one in NINE), "#regularization", "#noisy_data", "#noisy_data"]
        assert {str(a["id"]) for _, a in shown.tags if "id" in a} >= {one.study for one in NINE}
        worse, doubts = (
            "Where synchronized statistics do worse than per-device ones",
            "2 things to know before believing this",
        )
        assert shown.headings.index(worse) < shown.headings.index(doubts)


def test_no_such_case_is_said_too(tmp_path: Path) -> None:
    both = [claim_results.versus(str(at), "not decided", 0.1, 0.5, n=at) for at in range(4)]  # the first has no pair
    for versus, said in (
        (both, "None of the 3 cases that have both showed it."),
        (both[:2], "The one case that has both did not show it."),
        (both[:1], "No case has both synchronized and per-device statistics."),
        ([], "No case has both synchronized and per-device statistics."),
    ):
        one = claim_results.finding("x", 1, "X", versus=versus[:1])
        page.write([one, claim_results.finding("y", 2, "Y", versus=versus[1:])], "A title", "", tmp_path)
        for shown in (html_page(tmp_path), markdown_page(tmp_path)):
            assert shown.text.count(said) == 2
            assert not [heading for heading in shown.headings if "to know before believing" in heading]


def test_what_matters_comes_first_and_nothing_is_missing(html: Page, markdown: Page) -> None:
    for shown in (html, markdown):
        text = flat(shown.text.replace(claim_results.TITLE, "", 1))  # of the window
        said = [claim_results.QUESTION, "local", "How to read this", "docs/claims.md", "at the level 0.01", "Holm 1979"]
        said += [
            "Where synchronized statistics do worse",
            "Regularization through batch noise: regularization/x/y/2 (sync, seed 2) failed.",
            "Less dependence on initialization: no run is there",
        ]
        for one in NINE:
            said += [one.article, one.method, *one.verdicts.values()]
            said += [plot.title for plot in one.plots if len(plot.frame)]
            said += ["Each case, norm by norm", f"{one.seeds} seeds, {one.runs} runs, {one.finished} with a result"]
            said += [one.command]
        at = 0
        for words in [*said, "Runs and versions", "Computed from the run directories by syncbn"]:
            at = text.find(flat(words), at)
            assert at >= 0, words
        assert "96 with a result, of which 12 diverged and count with the error that they have." in text
        assert "No plot of seconds: no run has a value that can be drawn." in text
    assert cells(html)[-1] == cells(markdown)[-1]
    assert cells(html)[-1][-1] == ["all", "—", "358", "357", "12"]
    assert [heading for heading in html.headings if heading in markdown.headings] == markdown.headings


def test_the_page_stands_alone(nine: Path, html: Page) -> None:
    assert not {tag for tag, _ in html.tags} & {"script", "img", "iframe", "object", "base", "form"}
    text = (nine / "report.html").read_text(encoding="utf-8")
    identifiers = [value for _, attributes in html.tags if (value := attributes.get("id"))]
    assert len(identifiers) == len(set(identifiers))
    used = re.findall(r"url\(#(.*?)\)", text) + re.findall(r'href="#(.*?)"', text)
    assert set(used) <= set(identifiers)
    leads = {str(value) for _, a in html.tags for name, value in a.items() if name in ("href", "src", "xlink:href")}
    assert all(lead.startswith(("#", "data:")) for lead in leads)


def test_words_are_text_not_markup(html: Page, markdown: Page) -> None:
    for shown in (html, markdown):
        assert not {tag for tag, _ in shown.tags} & {"script", "b"}
        assert f"8. {NINE[7].text}" in shown.headings
        assert flat(NINE[7].method) in flat(shown.text)
        assert "with |x| < 3 & `more`" in {cell for table in cells(shown) for row in table for cell in row}


def test_files_are_linked_and_every_plot_is_a_file(nine: Path, html: Page, markdown: Page) -> None:
    linked = {value for _, a in markdown.tags if (value := a.get("src") or a.get("href")) and value[0] != "#"}
    drawn = {
        f"plots/{one.study}-{plot.name}-{at}" for one in NINE for at, plot in enumerate(one.plots, 1) if len(plot.frame)
    }
    written = {f"tables/{name}.csv" for name in ("verdicts", "cases", "versus", "published", "plots")}
    pictures = {f"{plot}.{kind}" for plot in drawn for kind in ("png", "svg")}
    assert set(files(nine)) == {"report.html", "report.md"} | written | pictures
    assert linked == {f"{plot}.png" for plot in drawn} | written - {"tables/plots.csv"}
    assert [tag for tag, _ in html.tags].count("svg") == len(drawn)


def test_csv_files_have_all_digits(nine: Path) -> None:
    for table, kind, name in KINDS:
        back = pd.read_csv(nine / "tables" / f"{table}.csv", keep_default_na=False)
        expected = [[one.study, one.number, *vars(row).values()] for one in NINE for row in getattr(one, name)]
        assert list(back.columns) == ["study", "number", *(field.name for field in fields(kind))]
        assert [list(map(same, row)) for row in back.to_numpy()] == [list(map(same, row)) for row in expected]
    points = pd.read_csv(nine / "tables" / "plots.csv", keep_default_na=False)
    expected = [
        [one.study, one.number, f"{one.study}-{plot.name}-{at}", *row]
        for one in NINE
        for at, plot in enumerate(one.plots, 1)
        for row in plot.frame.itertuples(index=False)
    ]
    assert [list(map(same, row)) for row in points.to_numpy()] == [list(map(same, row)) for row in expected]
    verdicts = pd.read_csv(nine / "tables" / "verdicts.csv")
    assert list(verdicts.verdict) == [one.verdicts.get(side, "not asked") for one in NINE for side in one.sides]
    assert list(verdicts.sharing.fillna("")) == [one.sharing for one in NINE for _ in one.sides]
    assert set(verdicts.baseline) == {"none"}


def same(value: Any) -> Any:
    """Converts text to a number; a missing value becomes ""."""
    if isinstance(value, bool) or value in ("True", "False"):
        return str(value)
    try:
        return "" if value in ("", None) or float(value) != float(value) else float(value)
    except ValueError:
        return value


def test_the_same_findings_give_the_same_bytes_and_nothing_of_an_older_page_stays(nine: Path, tmp_path: Path) -> None:
    shutil.copytree(nine, tmp_path, dirs_exist_ok=True)
    others = ["plots/mine.png", "plots/gradients-start-2.png", "tables/mine.csv", "plots/seeds.svg"]
    for other in others:
        (tmp_path / other).write_text(other, encoding="utf-8")
    few = [NINE[4], replace(NINE[7], plots=NINE[7].plots)]
    page.write(few, "Two claims", "", tmp_path)
    first = files(tmp_path)
    plots = {name for name in first if name.startswith("plots/")} - set(others)
    assert plots == {"plots/noisy_data-labels-1.png", "plots/noisy_data-labels-1.svg"}
    assert [first[other].decode() for other in others] == others
    page.write(few, "Two claims", "", tmp_path)
    assert files(tmp_path) == first
    assert first["plots/noisy_data-labels-1.svg"] == (nine / "plots/noisy_data-labels-1.svg").read_bytes()


def test_a_table_that_names_other_places_deletes_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "mine.png").write_text("mine", encoding="utf-8")
    for contents in (f"plot\n../mine\n{tmp_path}/mine\n", "no,such\n1,2\n", ""):
        (tmp_path / "tables" / "plots.csv").write_text(contents, encoding="utf-8")
        page.write([claim_results.finding("x", 1, "X")], "A title", "", tmp_path)
    assert (tmp_path / "mine.png").read_text(encoding="utf-8") == "mine"


def test_the_page_of_one_claim_lies_beside_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("a report", encoding="utf-8")
    sole: Finding = replace(NINE[1], plots=[])
    assert page.write([sole], sole.text, "", tmp_path, name="claim") == tmp_path / "claim.html"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "a report"
    shown = html_page(tmp_path, "claim")
    assert shown.headings[0] == sole.text
    assert sole.problems[0] in shown.text
    assert len(cells(shown)[0]) == 2
    assert (tmp_path / "claim.md").exists()
