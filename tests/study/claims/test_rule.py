"""Tests the check of a claim's rule against the study's parts, and the errors of invalid rules."""

import math
from typing import Any

import pytest

from syncbn.study.claims import rule
from syncbn.training.errors import SettingError
from tests.study.support.claim_study import PLOT, study
from tests.support.refuses import refuses

USABLE = "over: highest needs a number, what the metric may be at most"
FIGURE = {"what": "steps", "published": 2, "source": "a paper"}


def changed(where: str, value: Any) -> dict[str, Any]:
    """The study with another value at a dotted path under ``claim``."""
    made = study({"plain": {}}, literature=[dict(FIGURE)], plots=[dict(PLOT)])
    at: Any = made["claim"]
    *path, last = [int(word) if word.isdigit() else word for word in where.split(".")]
    for word in path:
        at = at[word]
    at[last] = value
    return made


def test_what_is_left_out() -> None:
    claim = rule.parse(study(sides=["local", "sync"]))
    (case,) = claim.cases.values()
    assert (case.sides, case.against_side, case.against) == (("local", "sync"), "none", case.reading)
    assert (case.when, case.what, case.reading.magnitude) == ("", "", False)
    assert (case.reading.less, case.at_most) == ("", None)
    (plot,) = claim.plots
    assert plot.conditions == ("0.1", "1", "10")
    assert plot.sides == ("none", "local", "sync", "group_norm")
    assert rule.parse(changed("cases.plain.over", "mean")).cases["plain"].reading.conditions == ("0.1", "1", "10")
    assert rule.parse(changed("literature.0.published", 2)).literature[0].published == "2"


def test_what_is_taken_away_is_taken_from_both() -> None:
    (case,) = rule.parse(study({"plain": {"over": "mean", "conditions": [1, 10], "less": 0.1}})).cases.values()
    assert case.reading.less == case.against.less == "0.1"
    assert case.reading.asked == ("1", "10", "0.1")
    (other,) = rule.parse(study({"plain": {"over": "10", "less": 0.1, "against": {"less": 1}}})).cases.values()
    assert (other.reading.less, other.against.less) == ("0.1", "1")


def test_a_part_of_one_condition_needs_no_word_on_conditions() -> None:
    made = changed("cases.plain.over", None)
    del made["parts"]["one"]["conditions"]
    assert rule.parse(made).cases["plain"].reading.conditions == ("",)


@pytest.mark.parametrize(
    ("where", "value", "setting", "shown", "words"),
    [
        ("text", None, "text", None, "it is missing"),
        ("casse", {}, "casse", None, "there is no such key; use number, text, "),
        ("number", "one", "number", "one", "use a valid integer"),
        ("baseline", "nome", "baseline", "nome", "use one of none, local, sync, group_norm"),
        ("sides", "sync", "sides", "sync", "use a list"),
        ("sides", ["syncc"], "cases.plain.sides", "syncc", "use one of none, local, sync, group_norm"),
        ("cases", {}, "cases", {}, "use a list of one or more"),
        ("plots", [], "plots", [], "use a list of one or more"),
        ("cases.plain", 3, "cases.plain", 3, "use a section with part, metric, "),
        ("cases.plain.usabel", 3, "cases.plain.usabel", None, "there is no such key; use part, metric, "),
        ("cases.plain.metric", None, "cases.plain.metric", None, "it is missing"),
        ("cases.plain.part", "two", "cases.plain.part", "two", "use one of one, other"),
        ("cases.plain.over", "2", "cases.plain.over", "2", "use one of mean, worst, best, highest, 0.1, 1, 10"),
        ("cases.plain.over", None, "cases.plain.over", None, "the part has several conditions; use one of mean, "),
        ("cases.plain.conditions", [1, 2], "cases.plain.conditions", "2", "use one of 0.1, 1, 10"),
        ("cases.plain.over", "highest", "cases.plain.usable", None, USABLE),
        ("cases.plain.usable", 10, "cases.plain.usable", "10", "works with over: highest only"),
        ("cases.plain.wants", "less", "cases.plain.wants", "less", "use 'lower' or 'higher'"),
        ("cases.plain.effect", "times", "cases.plain.effect", "times", "use 'ratio' or 'difference'"),
        ("cases.plain.at_least", "much", "cases.plain.at_least", "much", "use a valid number"),
        ("cases.plain.at_most", "much", "cases.plain.at_most", "much", "use a valid number"),
        ("cases.plain.less", "2", "cases.plain.less", "2", "use one of 0.1, 1, 10"),
        ("cases.plain.against", {"less": "2"}, "cases.plain.against.less", "2", "use one of 0.1, 1, 10"),
        ("cases.plain.magnitude", 1, "cases.plain.magnitude", 1, "use true or false"),
        ("cases.plain.sides", ["ghost"], "cases.plain.sides", "ghost", "use one of local, sync"),
        ("cases.plain.against", {"sides": "x"}, "cases.plain.against.sides", None, "there is no such key; use side"),
        ("cases.plain.against", {"side": "x"}, "cases.plain.against.side", "x", "use one of none, local, "),
        ("cases.plain.against", {"part": "other"}, "cases.plain.against.over", "0.1", "use one of mean, "),
        ("cases.plain.against", {"side": "sync"}, "cases.plain.sides", "sync", "it is compared with itself"),
        ("literature.0.value", 2, "literature.0.value", "2", "name the case and the side of our number"),
        ("literature.0.case", "x", "literature.0.case", "x", "use one of plain"),
        ("literature.0.case", "plain", "literature.0.side", "", "use one of local, sync"),
        ("literature.0.off", 1, "literature.0.off", None, "there is no such key"),
        ("plots.0.kind", "pie", "plots.0.kind", "pie", "use one of 'conditions', 'numbers', 'layers'"),
        ("plots.0.kind", "numbers", "plots.0.at", None, "it is missing"),
        ("plots.0.title", None, "plots.0.title", None, "it is missing"),
        ("plots.0.metric", None, "plots.0", None, "give a metric, or series"),
        ("plots.0.conditions", [3], "plots.0.conditions", "3", "use one of 0.1, 1, 10"),
        ("plots.0.sides", ["x"], "plots.0.sides", "x", "use one of none, "),
    ],
)
def test_a_wrong_value_is_refused(where: str, value: Any, setting: str, shown: Any, words: str) -> None:
    with refuses(f"study.claim.{setting}", shown, words):
        rule.parse(changed(where, value))


@pytest.mark.parametrize(
    ("where", "value", "line"),
    [
        ("text", None, "text: it is missing"),
        ("casse", {}, "casse: there is no such key; use number, text, "),
        ("cases", {}, "cases={}: use a list of one or more"),
        ("number", "one\ntwo", "number=one two: use a valid integer"),
        ("cases.plain.over", "2", "cases.plain.over=2: use one of mean, worst, best, highest, 0.1, 1, 10"),
        ("cases.plain.at_least", True, "cases.plain.at_least=true: use a valid number"),
        ("cases.plain.usable", 10, "cases.plain.usable=10: works with over: highest only; leave it out"),
        ("literature.0.case", "plain", "literature.0.side=: use one of local, sync"),
        ("plots.0.metric", None, "plots.0: give a metric, or series (metrics by name)"),
    ],
)
def test_how_a_wrong_value_is_printed(where: str, value: Any, line: str) -> None:
    with pytest.raises(SettingError) as caught:
        rule.parse(changed(where, value))
    assert str(caught.value).startswith(f"study.claim.{line}")


def test_two_settings_that_contradict_each_other() -> None:
    ratio = {"effect": "ratio", "at_least": 0}
    words = {"part": "other", "over": "highest", "usable": 1}
    higher = {"wants": "higher", "at_most": 3}
    sizes = {"over": "highest", "usable": 1, "less": "1"}
    for cases, setting, shown, hint in (
        ({"a": higher}, "a.at_most", "3", "works with wants: lower only"),
        ({"a": sizes}, "a.less", "1", "over: highest results in a condition, not in test/loss"),
        ({"a": ratio}, "a.at_least", "0", "a ratio is above 0"),
        ({"a": words}, "a.over", "highest", "conditions have to be numbers, not a, b"),
        ({"a": {"when": "so"}, "b": {}}, "b.when", None, "one of several cases needs words"),
    ):
        with refuses(f"study.claim.cases.{setting}", shown, hint):
            rule.parse(study(cases))
    numbers = PLOT | {"kind": "numbers", "at": [1]}
    with refuses("study.claim.plots.0.condition", None, "the part has several; use one of 0.1, 1, 10"):
        rule.parse(study(plots=[numbers]))


@pytest.mark.parametrize(
    ("where", "value", "setting", "shown", "words"),
    [
        ("plots.0", 3, "plots.0", 3, "use a section"),
        ("plots.0.kind", None, "plots.0.kind", "None", "use one of 'conditions', 'numbers'"),
        ("plots.0.off", 1, "plots.0.off", None, "there is no such key; use part, title, "),
        ("plots.0.y_log", "yes", "plots.0.y_log", "yes", "use true or false"),
        ("plots.0.conditions", "0.1", "plots.0.conditions", "0.1", "use a list"),
        ("cases.plain.at_least", True, "cases.plain.at_least", True, "use a valid number"),
        ("cases.plain.at_least", math.inf, "cases.plain.at_least", math.inf, "use a finite number"),
        ("cases.plain.against", {"wants": "lower"}, "cases.plain.against.wants", None, "there is no such key; "),
        ("cases.plain.against", 3, "cases.plain.against", 3, "use a section with side, part, "),
        ("cases.plain.against", {"side": ["x"]}, "cases.plain.against.side", ["x"], "use a valid string"),
        ("cases.plain.name", "x", "cases.plain.name", None, "there is no such key; use part, metric, "),
    ],
)
def test_an_error_has_no_words_of_pydantic(where: str, value: Any, setting: str, shown: Any, words: str) -> None:
    with refuses(f"study.claim.{setting}", shown, words):
        rule.parse(changed(where, value))
    with pytest.raises(SettingError) as caught:
        rule.parse(changed(where, value))
    assert "pydantic" not in str(caught.value)
