"""Tests the comparison of synchronized with per-device statistics: the word for each case, and the summary."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from syncbn.study.claims.result import Versus
from syncbn.study.claims.verdict import sharing
from tests.study.support.claim_study import BASE as LOCAL
from tests.study.support.claim_study import errors, found, losses, study

SPREAD = [0.0, 0.1, -0.1, 0.05, -0.05, 0.08, -0.08, 0.02]


def by(mean: float) -> list[float]:
    return [value - mean - off for value, off in zip(LOCAL, SPREAD, strict=True)]


@pytest.mark.parametrize(
    ("sync", "word", "is_small"),
    [
        (by(3), "better", False),
        (by(-3), "worse", False),
        (by(0.5), "better", True),
        (by(-0.5), "worse", True),
        (by(0.01), "no difference", False),
        (LOCAL, "no difference", False),
        ([value + (-1) ** place for place, value in enumerate(LOCAL)], "not decided", False),
        (LOCAL[:2], "not decided", False),
        (by(3)[:1], "not run", False),
        ([], "not run", False),
    ],
)
def test_a_word_for_a_case(tmp_path: Path, sync: list[float], word: str, is_small: bool) -> None:
    finding = found(losses(tmp_path, none=LOCAL, local=LOCAL, sync=sync), study())
    (one,) = finding.versus
    assert (one.word, one.is_small, one.needed) == (word, is_small, 1.0)
    assert finding.sharing == ("no difference" if is_small else word)
    told = [*finding.better, *finding.worse]
    assert len(told) == (word in ("better", "worse"))
    assert all((", less than the 1 that would matter: test loss " in line) == is_small for line in told)
    assert all(line.endswith((", 8 seeds.", "2 seeds.")) for line in told)


def test_no_difference_has_to_be_shown(tmp_path: Path) -> None:
    """The equivalence test with the required effect as margin agrees with scipy; p is doubled for two cases."""
    cases = {"plain": {"when": "here"}, "again": {"when": "there"}}
    one, _ = found(losses(tmp_path, none=LOCAL, local=LOCAL, sync=by(0.9)), study(cases)).versus
    e = np.subtract(LOCAL, by(0.9))
    outside = max(stats.ttest_1samp(e, end, alternative=way).pvalue for end, way in ((-1.0, "greater"), (1.0, "less")))
    assert one.p_same == pytest.approx(2 * outside)
    assert one.p == pytest.approx(2 * stats.ttest_1samp(e, 0).pvalue)


def test_a_ratio_is_within_what_is_needed_either_way(tmp_path: Path) -> None:
    sync = [value * 1.2 * (1 + off / 10) for value, off in zip(LOCAL, SPREAD, strict=True)]
    case = {"effect": "ratio", "at_least": 1.25}
    (one,) = found(losses(tmp_path, none=LOCAL, local=LOCAL, sync=sync), study({"plain": case})).versus
    e = np.log(LOCAL) - np.log(sync)
    assert one.p_same == pytest.approx(stats.ttest_1samp(e, -math.log(1.25), alternative="greater").pvalue)
    assert (one.word, one.is_small) == ("worse", True)


def test_an_error_may_differ_by_three_quarters_of_a_point(tmp_path: Path) -> None:
    """A large required effect over no norm does not widen the margin between sync and local."""
    places = errors(tmp_path, none=LOCAL, local=LOCAL, sync=by(3))
    (one,) = found(places, study({"plain": {"metric": "test/acc", "at_least": 10}})).versus
    assert (one.word, one.needed, one.is_small) == ("better", 0.75, False)


def case(word: str, when: str = "", is_small: bool = False) -> Versus:
    nan = math.nan
    return Versus("a", when, "loss", "", 8, 1.0, 1.0, False, nan, nan, nan, nan, word, is_small=is_small)


@pytest.mark.parametrize(
    ("versus", "words"),
    [
        ([], ""),
        ([case("better")], "better"),
        ([case("worse", "at a"), case("better", "at b"), case("worse", "at c")], "better at b; worse at a and at c"),
        ([case("worse", "at a", is_small=True), case("better", "at b")], "better at b"),
        ([case("worse", "at a"), case("not decided", "at b")], "worse at a"),
        ([case("no difference"), case("better", is_small=True)], "no difference"),
        ([case("no difference"), case("not decided")], "not decided"),
        ([case("no difference"), case("not run")], "not decided"),
        ([case("not run"), case("not run")], "not run"),
    ],
)
def test_a_few_words_for_all(versus: list[Versus], words: str) -> None:
    assert sharing(versus) == words
