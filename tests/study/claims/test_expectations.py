"""Tests the rules of expected effects: what they ask, what numbers answer them, and what an invalid one reports."""

import json
from pathlib import Path
from typing import Any

import pytest

from syncbn.study import cells
from syncbn.study.claims import expectations
from syncbn.study.compare.paired_tests import mean_interval
from syncbn.study.report import expectations as page
from syncbn.study.report.expectations import APPEARS, MISSES, NOT_RUN, UNDECIDED, Answer
from syncbn.study.report.write import write_several
from syncbn.study.runner.rewrite import rewrite
from tests.study.support.claim_study import BASE, runs, study
from tests.support.refuses import ANY, refuses

RULE = {"text": "sync lowers it", "part": "one", "condition": "0.1", "metric": "test/loss", "side": "sync"}
RULE |= {"against": {"side": "local"}, "expect": "lower", "by": 1}


def answered(root: Path, **rules: dict[str, Any]) -> dict[str, Answer]:
    made = study() | {"expectations": {name: RULE | rule for name, rule in rules.items()}}
    found = expectations.answers(made, cells.cells(made, [], root), root)
    return dict(zip(rules, found, strict=True))


def of_losses(root: Path, sync: list[float], local: list[float] | None = None) -> Path:
    numbers = {"sync": sync, "local": BASE if local is None else local}
    return runs(
        root,
        {("one", "0.1", side): {seed: {"test/loss": v} for seed, v in enumerate(of)} for side, of in numbers.items()},
    )


SPREAD = [0.1, -0.1, 0.2, -0.2, 0.05, -0.05, 0.15, -0.15]


@pytest.mark.parametrize(
    ("shift", "expect", "by", "answer"),
    [
        (-3, "lower", 1, APPEARS),
        (-3, "higher", 1, MISSES),
        (3, "higher", 1, APPEARS),
        (3, "lower", 1, MISSES),
        (-0.5, "lower", 1, MISSES),  # lower, but by less than what matters
        (-1, "lower", 1, UNDECIDED),
        (0, "same", 1, APPEARS),
        (-3, "same", 1, MISSES),
        (3, "same", 1, MISSES),
        (1, "same", 1, UNDECIDED),
        (-3, "lower", 0, APPEARS),
    ],
)
def test_the_mean_difference_answers(tmp_path: Path, shift: float, expect: str, by: float, answer: str) -> None:
    root = of_losses(tmp_path, [one + shift + noise for one, noise in zip(BASE, SPREAD, strict=True)])
    assert answered(root, it={"expect": expect, "by": by})["it"].answer == answer


def test_the_tests_are_paired_and_corrected_for_all_rules(tmp_path: Path) -> None:
    """The sides differ less than their seeds do, so only pairs show it; of twelve rules, each has to show more."""
    more = [0.5, 1.5, 0.2, 1.2, 0.9, -0.1, 1.1, 0.4]
    root = of_losses(tmp_path, [one - 1 - each for one, each in zip(BASE, more, strict=True)])
    alone = answered(root, it={})["it"]
    assert alone.answer == APPEARS
    difference, low, high = -1 - sum(more) / 8, *mean_interval([-1 - each for each in more])
    assert f"−{-difference:.2f} [−{-low:.2f}, −{-high:.2f}], 8 seeds" in alone.found
    twelve = answered(root, **{f"it{number}": {} for number in range(12)})
    assert {each.answer for each in twelve.values()} == {UNDECIDED}


def test_a_condition_against_another_of_the_same_side(tmp_path: Path) -> None:
    numbers = {
        ("one", at, "sync"): {seed: {"test/loss": v} for seed, v in enumerate(of)}
        for at, of in {"0.1": BASE, "10": [3 * v for v in BASE]}.items()
    }
    found = answered(runs(tmp_path, numbers), it={"condition": 10, "against": {"condition": "0.1"}, "expect": "higher"})
    assert found["it"].answer == APPEARS
    assert "(sync at 10) against" in found["it"].found


def test_without_runs_nothing_is_claimed(tmp_path: Path) -> None:
    found = answered(tmp_path, it={}, fails={"expect": "fails", "error": "too few"})
    assert [each.answer for each in found.values()] == [NOT_RUN, NOT_RUN]


def test_runs_that_fail_as_expected_and_those_that_do_not(tmp_path: Path) -> None:
    root = of_losses(tmp_path, BASE)
    rule = {"expect": "fails", "error": "Expected more than 1 value"}
    assert answered(root, it=rule)["it"].answer == MISSES  # they finished
    for seed in range(8):
        path = root / "one" / "0.1" / "sync" / str(seed)
        (path / "result.json").unlink()
        (path / "run.json").write_text(json.dumps({"status": "failed"}), encoding="utf-8")
        (path / "error.txt").write_text("ValueError: Expected more than 1 value per channel", encoding="utf-8")
    assert answered(root, it=rule)["it"].answer == APPEARS
    assert answered(root, it=rule | {"error": "another"})["it"].answer == MISSES


@pytest.mark.parametrize(
    ("rule", "setting", "hint"),
    [
        ({"side": "nope"}, "it.side", "use one of none, local, sync, group_norm"),
        ({"condition": "2"}, "it.condition", "use one of 0.1, 1, 10"),
        ({"part": "two"}, "it.part", "use one of one, other"),
        ({"against": {"side": "no"}}, "it.against.side", "use one of"),
        ({"against": {}}, "it.against", "compared with itself"),
        ({"expect": "more"}, "it.expect", "higher"),
        ({"expect": "same", "by": 0}, "it.by", "above 0"),
        ({"expect": "fails"}, "it.error", "part of the message"),
        ({"metric": None}, "it.metric", "missing"),
        ({"by": -1}, "it.by", "greater than or equal to 0"),
        ({"bye": 1}, "it.bye", "no such key"),
    ],
)
def test_an_invalid_rule_is_refused_before_the_runs(rule: dict[str, Any], setting: str, hint: str) -> None:
    with refuses(f"study.expectations.{setting}", ANY, hint):
        expectations.parse(study() | {"expectations": {"it": RULE | rule}})


def test_the_page_begins_with_what_does_not_appear(tmp_path: Path) -> None:
    answers = [Answer(word, word, f"{word} numbers", f"{word} rule") for word in (APPEARS, UNDECIDED, MISSES, NOT_RUN)]
    write_several("A study", "Does it?", {}, tmp_path, expected=answers)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**1 of 4 expected effects appears; 1 does not appear; 1 is undecided; 1 is not run.**" in text
    order = [text.index(f"{symbol} ") for symbol in page.SYMBOLS.values()]
    assert order == sorted(order)
    assert text.index("1 of 4") < order[0] < text.index("appears rule")
    before = text
    (tmp_path / "report.md").unlink()
    rewrite(tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == before
