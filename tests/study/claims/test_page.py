"""Tests the page on claims: it has each figure of the findings, and the most important results first."""

import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from syncbn.study.claims.report import matrix, page, sentences, tables
from syncbn.study.claims.result import CaseLabel, Finding, Published, Row, Versus
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


ANSWER = (
    "With synchronized batch norm, 1 of 9 claims holds (1), 1 holds in part (6), 3 fail (2, 8 and 9), 3 are undecided"
    " (3, 5 and 7) and 1 was not tested (4). Compared with per-device batch norm, it is worse in claim 2, better in"
    " claim 9, better and worse in claim 8, no different in claim 1 and undecided in claim 6."
)
MATRIX = [
    ["✓ holds", "✓ holds", "✓ holds", "— not tested", "= no difference"],
    ["◐ holds only with small batches", "✗ fails", "— not tested", "— not tested", "✗ worse"],
    ["◐ holds in 1 of 3 cases", "? undecided", "— not tested", "— not tested", "— not tested"],
    ["— not tested"] * 5,
    ["? undecided"] * 3 + ["— not tested"] * 2,
    ["◐ holds in 1 of 2 cases", "◐ holds in part", "— not tested", "— not tested", "? undecided in 1 of 2 cases"],
    ["✗ fails", "? undecided", "— not tested", "— not tested", "— not tested"],
    ["? undecided", "✗ fails", "✗ fails", "— not tested", "◐ better in 1, worse in 1"],
    ["✓ holds", "✗ fails", "— not tested", "✓ holds", "✓ better"],
]


def test_the_matrix_has_nine_rows_and_a_column_for_each_norm_and_for_sharing(html: Page, markdown: Page) -> None:
    heads = ["claim", *NORMS, "sharing pays"]
    rows = [[f"{one.number}. {one.text}", *cells] for one, cells in zip(NINE, MATRIX, strict=True)]
    for shown in (html, markdown):
        assert cells(shown)[0] == [heads, *rows]
    assert all(len(one.text.split()) <= 8 for one in NINE)


def test_the_first_screen_answers(html: Page, markdown: Page) -> None:
    for shown in (html, markdown):
        text = flat(shown.text)
        assert ANSWER in text
        assert text.index(ANSWER) < text.index("1. Faster convergence") < text.index("✓ holds, ◐ holds in part")
        against = "local: per-device statistics (against none). sync: synchronized statistics (against none)."
        assert text.index(against) < text.index("What to know before believing it")


def test_heads_name_all_that_a_norm_is_judged_against() -> None:
    rows = [claim_results.row("a", "sync", "open", against="local")]
    rows += [claim_results.row("b", "sync", "measured", against="ghost")]
    one = claim_results.finding("x", 1, "X")
    other = claim_results.finding("y", 2, "Y", rows=rows, sides=["sync", "local_mean"])
    assert tables.compared_sides([one, other], "sync") == "none or local"
    assert tables.compared_sides([one, replace(other, baseline="ghost")], "group_norm") == "none"  # not asked
    assert tables.compared_sides([replace(other, baseline="ghost")], "local_mean") == "ghost"


CASES = {"a": "with sigmoid", "b": "with tanh", "c": "with a very long name"}


@pytest.mark.parametrize(
    ("verdict", "answers", "symbol", "words"),
    [
        ("holds", "yes yes", "✓", "holds"),
        ("holds (so far, by 4 of 8 seeds)", "yes", "✓", "holds so far"),
        ("does not hold", "no no", "✗", "fails"),
        ("does not hold (so far, by 4 of 8 seeds)", "no", "✗", "fails so far"),
        ("not run", "", "—", "not run"),
        ("not asked", "", "—", "not tested"),
        ("not decided by 8 seeds", "open open", "?", "undecided"),
        (
            "not decided by 8 seeds with tanh; does not hold with sigmoid",
            "no open",
            "?",
            "undecided; fails with sigmoid",
        ),
        ("not decided by 8 seeds with x", "open open no", "?", "undecided; fails in 1 of 3"),
        ("holds only with sigmoid", "yes no", "◐", "holds only with sigmoid"),
        ("holds only with sigmoid; not decided with tanh by 8 seeds", "yes open", "◐", "holds with sigmoid"),
        ("holds only with sigmoid and with tanh", "yes yes no", "◐", "holds in 2 of 3 cases"),
        ("holds only with tanh; and with more", "no yes yes", "◐", "holds, but not with sigmoid"),
        ("holds only with sigmoid (so far, by 4 of 8 seeds)", "yes no", "◐", "holds only with sigmoid so far"),
        ("holds only with sigmoid and with tanh (so far, by 4 of 8 seeds)", "yes yes no", "◐", "holds in part so far"),
        ("holds only with more", "", "◐", "holds in part"),
    ],
)
def test_a_cell_has_a_symbol_and_few_words(verdict: str, answers: str, symbol: str, words: str) -> None:
    rows = [claim_results.row(name, "sync", says) for name, says in zip("abc", answers.split(), strict=False)]
    rows.append(claim_results.row("measured", "sync", "measured"))
    labels = {name: CaseLabel(short) for name, short in CASES.items()}
    one = claim_results.finding("x", 1, "X", rows=rows, verdicts={"sync": verdict}, labels=labels)
    assert matrix.norm_cell(one, "sync") == (symbol, words)
    assert len(words.split()) <= 6


@pytest.mark.parametrize(
    ("sharing", "words", "symbol", "shown"),
    [
        ("worse with sigmoid", "worse better~", "✗", "worse with sigmoid"),
        ("worse with sigmoid and with tanh", "worse worse open", "✗", "worse with sigmoid and with tanh"),
        ("better", "better", "✓", "better"),
        ("better with a", "not better", "✓", "better with tanh"),
        ("better with a", "not not better", "✓", "better with a very long name"),
        ("better with tanh; worse with sigmoid", "worse better", "◐", "better in 1, worse in 1"),
        ("better with tanh; worse with sigmoid", "", "◐", "better and worse"),
        ("no difference", "no no", "=", "no difference"),
        ("not decided", "not not", "?", "undecided"),
        ("not decided", "not no", "?", "undecided in 1 of 2 cases"),
        ("not run", "", "—", "not run"),
        ("", "", "—", "not tested"),
    ],
)
def test_sharing_has_a_symbol_and_few_words(sharing: str, words: str, symbol: str, shown: str) -> None:
    full = {"not": "not decided", "no": "no difference", "open": "not decided"}
    versus = [
        claim_results.versus(name, full.get(word, word.strip("~")), 1.0, 0.5, is_small="~" in word)
        for name, word in zip("abc", words.split(), strict=False)
    ]
    labels = {name: CaseLabel(short) for name, short in CASES.items()}
    one = claim_results.finding("x", 1, "X", sharing=sharing, versus=versus, labels=labels)
    assert matrix.sharing_cell(one) == (symbol, shown)
    assert len(shown.split()) <= 6


def test_one_claim_is_one_sentence() -> None:
    def summary(verdict: str, sharing: str) -> list[str]:
        return matrix.summary([claim_results.finding("x", 3, "X", verdicts={"sync": verdict}, sharing=sharing)])

    assert summary("holds", "") == ["With synchronized batch norm, the claim holds."]
    assert summary("not asked", "worse") == [
        "With synchronized batch norm, the claim was not tested.",
        "Synchronized against per-device statistics: worse.",
    ]
    assert summary("not decided by 8 seeds", "not decided") == [
        "With synchronized batch norm, the claim is undecided.",
        "Whether it is better or worse than per-device batch norm is undecided.",
    ]
    sole = claim_results.finding("x", 3, "X", sides=["group_norm"], verdicts={"group_norm": "holds"})
    assert matrix.summary([sole]) == ["With group norm, the claim holds."]


def test_tones_are_in_the_matrix(html: Page) -> None:
    tones = [str(a["class"]).split()[-1] for _, a in html.tags if "verdict-cell" in str(a.get("class"))]
    assert tones == [matrix.TONES[cell[0]] for row in MATRIX for cell in row]


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
            # Half the width of all these intervals is above 1 and below 10, so one decimal is the second digit.
            effect = f"{row.effect:+.1f} points".replace("-", "−")
            assert cell[3] == f"{effect} {in_brackets(f'{row.low:+.1f}', f'{row.high:+.1f}')}"
            assert cell[4] == "+1 points" + (", and at most 20 %" if row.at_most else "")
            assert cell[6] == f"{row.value:.1f} {in_brackets(f'{row.value_low:.1f}', f'{row.value_high:.1f}')}"
            assert cell[8] == f"{row.other:.1f} {in_brackets(f'{row.other_low:.1f}', f'{row.other_high:.1f}')}"
    of_first = ["2.51 times [2.20 to 2.83]", "1.25 times", "8", "40.2 [38.1 to 42.5]", "none"]
    assert shown[0][3:] == [*of_first, "100 [90 to 110]", "0.0012", "1", "steps to 95 %"]
    (far,) = (row for row in shown if row[0] == "with sigmoid")
    assert far[3:5] == ["3.4×10³⁰ times [2.1×10²⁹ to 5.0×10³¹]", "10 times"]
    (near,) = (row for row in shown if row[0] == "with ReLU")
    assert (near[3], near[10]) == ("3.4×10⁻⁷ times [1.0×10⁻⁸ to 0.0020]", "3.2×10⁻⁷")
    assert sum("at most" in row[4] for row in shown) == sum(row[2] == "measured" for row in shown) == 1
    one = claim_results.finding("x", 1, "X", rows=[claim_results.row("", "sync", "yes", at_most=80.0, note="a note")])
    shown = tables.build(one)["cases"].rows
    assert (shown[0][4], shown[0][11]) == ("1.25 times, and at most 80", "steps to 95 % (a note)")


def test_intervals_of_means_end_at_the_limits_of_the_metric(html: Page) -> None:
    wide = {"value": 1.0, "value_low": -2.0, "value_high": 4.0, "other": 99.0, "other_low": 96.0, "other_high": 102.0}
    row = claim_results.error("a", "sync", "yes", 98.0, **wide)
    labels = {"a": CaseLabel("", 0.0, 100.0)}
    (shown,) = tables.build(claim_results.finding("x", 1, "X", rows=[row], labels=labels))["cases"].rows
    assert (shown[6], shown[8]) == ("1.0 [0.0 to 4.0]", "99.0 [96.0 to 100.0]")
    (shown,) = tables.build(claim_results.finding("x", 1, "X", rows=[row]))["cases"].rows
    assert shown[6] == "1.0 [−2.0 to 4.0]"
    assert "Intervals of means end at the limits of the metric" in flat(html.text)


def test_sync_against_local_and_the_literature_are_beside_each_claim(html: Page, markdown: Page) -> None:
    for shown in (html, markdown):
        versus = [row for table in cells(shown) if table[0][1] == "sync is" for row in table[1:]]
        about = ["±1 points", "10", "20.7", "15.3", "2.0×10⁻⁵", "1", "test error, %"]
        assert versus[1] == ["with small batches", "worse", "−5.4 points [−6.6 to −4.2]", *about]
        same = ["1.25 times", "8", "40.2", "39.5", "1", "0.00031", "steps to 95 %"]
        assert versus[0] == ["—", "no difference", "0.980 times [0.910 to 1.060]", *same]
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


def section(shown: Page, number: int) -> str:
    """The text of a claim's section and of all after it."""
    one, text = NINE[number - 1], flat(shown.text)
    return text[text.index(f"{one.number}. {one.text} Claim: ") :]


def test_a_section_has_the_claim_its_verdict_and_the_main_figure_first(html: Page, markdown: Page) -> None:
    for shown in (html, markdown):
        text = section(shown, 2)
        about = [
            "Claim: The article says of batch norm: regularization through batch noise. Source: Ioffe & Szegedy 2015.",
            "With synchronized batch norm, the claim fails. With small batches, test error: 17.5 against 15.4 % with no"
            " norm, worse by 2.1 points [0.6 to 3.6], 8 seeds.",
            *NINE[1].worse,
            NINE[1].plots[0].title,
            "Details: the test, each case",
            "Test: Networks are trained",
            NINE[1].verdicts["local"],
            "Each case, norm by norm",
            "8 seeds, 6 runs, 5 with a result.",
            "python train.py +study=regularization",
        ]
        places = [text.find(flat(words)) for words in about]
        assert places == sorted(places)
        assert places[0] > 0


@pytest.mark.parametrize(
    ("row", "figure"),
    [
        (
            claim_results.row("", "sync", "yes"),
            "Steps to 95 %: 40.2 against 100 with no norm, better by a factor of 2.51 [2.20",
        ),
        (
            claim_results.row("", "sync", "no", effect=0.5, low=0.4, high=0.625),
            "worse by a factor of 2.00 [1.60 to 2.50], 8 seeds.",
        ),
        (claim_results.error("", "sync", "no", -2.0, at_most=10.0), "17.5 against 15.5 % with no norm, worse by 2.0 "),
        (claim_results.error("", "sync", "no", 5.0, at_most=10.0), " [3.5 to 6.5] (above the limit of 10 %), 8 seeds."),
        (claim_results.error("", "sync", "no", 5.0, n=1, planned=1), "better by 5.0 points [3.5 to 6.5], 1 seed."),
    ],
)
def test_the_main_figure_is_an_improvement_with_its_interval(row: Row, figure: str) -> None:
    verdicts = {"yes": "holds", "no": "does not hold"}
    one = claim_results.finding("x", 1, "X", rows=[row], verdicts={"sync": verdicts[row.says]})
    assert figure in sentences.verdict_sentence(one, "sync")[1]


def test_where_a_claim_fails_that_holds_in_part_is_in_its_verdict() -> None:
    rows = [claim_results.row(case, "sync", says) for case, says in (("a", "no"), ("b", "yes"), ("c", "no"))]
    one = claim_results.finding("x", 1, "X", rows=rows, verdicts={"sync": "holds only with b"})
    verdict, figure = sentences.verdict_sentence(one, "sync")
    assert verdict == "With synchronized batch norm, the claim holds in 1 of 3 cases."
    assert figure.startswith("With b, steps to 95 %: ")
    assert figure.endswith("8 seeds. It fails in 2 cases: with a; with c.")


def test_an_undecided_effect_is_explained_and_is_not_the_main_figure() -> None:
    rows = [claim_results.error(case, side, "open", 9.0) for case in "ab" for side in ("local", "sync")]
    rows += [claim_results.error("c", "sync", "measured", 9.0)]
    versus = [claim_results.versus(case, word, 0.3, 0.4) for case, word in (("a", "not decided"), ("b", "better"))]
    verdicts = {"sync": "not decided by 8 seeds"}
    one = claim_results.finding("x", 1, "X", rows=rows, versus=versus, verdicts=verdicts, alpha=0.05)
    assert sentences.verdict_sentence(one, "sync") == ("With synchronized batch norm, the claim is undecided.", "")
    assert sentences.undecided(one) == [
        "Why undecided: with a: local +9.0 points [+7.5 to +10.5], sync +9.0 points [+7.5 to +10.5]; with b: local +9.0"
        " points [+7.5 to +10.5], sync +9.0 points [+7.5 to +10.5]. The rule needs 1 points. 8 seeds are too few to"
        " show either answer at the level 0.05 after correction for 4 tests; the intervals are without that"
        " correction.",
        "Why it is undecided whether sharing pays (above 0, sync is better than local): with a: +0.3 points [−0.9 to"
        " +1.5]. 10 seeds show neither a difference nor its absence at the level 0.05 after correction for 2 cases.",
    ]
    assert sentences.undecided(claim_results.finding("x", 1, "X", rows=rows[-1:])) == []
    limited = replace(one, rows=[replace(rows[0], when="", at_most=17.0)], versus=[])
    (line,) = sentences.undecided(limited)
    assert (
        "local +9.0 points [+7.5 to +10.5], mean 17.5 % [16.2 to 18.8]. The rule needs 1 points and a mean of" in line
    )
    assert " at most 17 %. 8 seeds" in line


def test_what_to_know_is_grouped() -> None:
    published = [Published("a", "1", "b", "2", agrees) for agrees in ("no", "no", "yes", "open", "")]
    one = claim_results.finding("x", 1, "X", problems=["code has changes", "code has changes", "a run failed"])
    one = replace(one, left_out=["a", "b"])
    other = replace(one, number=2, text="Y", diverged=3, finished=5, published=published, problems=["code has changes"])
    assert sentences.doubts([one, other])[:4] == [
        "1. X; 2. Y: code has changes",
        "1. X: a run failed",
        "The budget leaves out runs of 4 cases (claims 1, 2). The details list them.",
        "3 of 5 runs diverged (claim 2: 3). Each counts with its test error, and its learning rate as not usable.",
    ]
    assert sentences.doubts([one, other])[-1].startswith(
        "2 of 4 figures expected from earlier work differ from ours by more than the tolerance (claim 2)."
    )
    alone = ["code has changes", "a run failed", "The budget leaves out runs of 2 cases. The details list them."]
    assert sentences.doubts([one])[:3] == alone
    assert not any("diverged" in line or "Undecided" in line or "figures" in line for line in sentences.doubts([one]))
    asked = replace(one, verdicts={"sync": "not decided by 8 seeds"})
    assert any(line.startswith("Undecided (?) means that the seeds are too few") for line in sentences.doubts([asked]))


def test_the_page_has_everything_in_order(html: Page, markdown: Page) -> None:
    for shown in (html, markdown):
        text = flat(shown.text.replace(claim_results.TITLE, "", 1))  # of the window
        said = [ANSWER, "1. Faster convergence", "= no difference. local: per-device", claim_results.QUESTION]
        said += [
            "What to know before believing it",
            "2. Regularization through batch noise: regularization/x/y/2 (sync, seed 2) failed.",
            "4. Less dependence on initialization: no run is there",
            "12 of 357 runs diverged (claim 3: 12)",
        ]
        said += ["How a verdict is made", "docs/claims.md", "at the level 0.01", "Holm 1979"]
        for one in NINE:
            said += [one.article, *one.worse, *one.better]
            said += [plot.title for plot in one.plots[:1] if len(plot.frame)]
            said += [one.method, *one.verdicts.values()]
            said += [plot.title for plot in one.plots[1:] if len(plot.frame)]
            said += ["Each case, norm by norm", f"{one.seeds} seeds, {one.runs} runs, {one.finished} with a result"]
            said += [one.command]
        at = 0
        for words in [*said, "Runs and versions", "Computed from the run directories by syncbn"]:
            at = text.find(flat(words), at)
            assert at >= 0, words
        assert "96 with a result, of which 12 diverged and count with their error." in text
        assert "No plot of seconds: no run has a value that can be drawn." in text
        linked = [a["href"] for tag, a in shown.tags if tag == "a" and str(a.get("href")).startswith("#")]
        assert linked == [f"#{one.study}" for one in NINE]
        assert {str(a["id"]) for _, a in shown.tags if "id" in a} >= {one.study for one in NINE}
        assert [tag for tag, _ in shown.tags].count("details") == len(NINE) + 1
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
    assert set(files(nine)) == {"report.html", "report.md", "tables/claims.json"} | written | pictures
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
