"""Tests the statistics of pairs with published examples, explicit formulas, and data without spread."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from syncbn.study.compare.paired_tests import Effect, decide, effect, holm, mean_interval

# Hours of sleep gained by ten patients with each of two drugs (Student 1908, "The probable error of a mean").
SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
NAN = math.nan


def t_tail(t: float, df: int) -> float:
    """P(T > t) from the incomplete beta function (Abramowitz & Stegun 26.7.1), without a library's t test."""
    half = special.betainc(df / 2, 0.5, df / (df + t * t)) / 2
    return float(half if t > 0 else 1 - half)


def test_students_sleep() -> None:
    found = effect(SLEEP[1], SLEEP[0], margin=0.75)
    assert found.n == 10
    assert found.difference == pytest.approx(1.58)
    assert found.p == pytest.approx(0.002833, abs=5e-7)  # t = 4.0621, 9 degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert found.p_wilcoxon == pytest.approx(2 * 2**-9)  # the nine that are not 0 are all positive
    assert found.differences == pytest.approx(np.subtract(SLEEP[1], SLEEP[0]))


@pytest.mark.parametrize("margin", [0.3, 0.75, 2.0])
def test_every_number_by_the_formula(margin: float) -> None:
    side, baseline = [2.1, 2.6, 1.9, 2.4, 2.2], [2.3, 2.5, 2.2, 2.4, 2.6]
    d = np.subtract(side, baseline)
    mean, error = d.mean(), math.sqrt(sum((d - d.mean()) ** 2) / 4) / math.sqrt(5)
    found = effect(side, baseline, margin)
    assert found.p == pytest.approx(2 * t_tail(abs(mean) / error, 4))
    assert found.p_tost == pytest.approx(max(t_tail((mean + margin) / error, 4), t_tail((margin - mean) / error, 4)))
    assert found.high - found.low == pytest.approx(2 * 2.7764451 * error)  # t at 97.5 %, 4 degrees of freedom
    assert (found.low + found.high) / 2 == pytest.approx(mean)
    assert mean_interval(d.tolist()) == pytest.approx((found.low, found.high))


@settings(max_examples=25)
@given(st.lists(st.floats(-5, 5), min_size=3, max_size=12), st.floats(0.1, 3))
def test_equivalence_at_5_percent_is_the_90_percent_interval_within_the_margin(
    values: list[float], margin: float
) -> None:
    if np.ptp(values) < 0.01:
        return
    found = effect(values, [0.0] * len(values), margin)
    low, high = stats.t.interval(0.9, len(values) - 1, np.mean(values), stats.sem(values))
    if min(abs(abs(low) - margin), abs(abs(high) - margin)) > 1e-6:
        assert (found.p_tost < 0.05) == (-margin < low and high < margin)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=9))
def test_sides_may_be_swapped_and_pairs_come_in_any_order(pairs: list[tuple[float, float]]) -> None:
    one, other = zip(*pairs, strict=True)
    there, back = effect(one, other, 0.75, 1e-4), effect(other[::-1], one[::-1], 0.75, 1e-4)
    assert there.difference == pytest.approx(-back.difference, abs=1e-9)
    for name in ("p", "p_wilcoxon", "p_tost"):
        assert getattr(there, name) == pytest.approx(getattr(back, name), rel=1e-6, abs=1e-9)


def test_that_nothing_differs_counts_as_often_as_it_was_seen() -> None:
    assert effect([2.0, 3.0, 4.0], [2.0, 3.0, 4.0], 0.75) == Effect(3, 0.0, 0.0, 0.0, 1.0, 1.0, 2**-3, (0.0, 0.0, 0.0))
    words = [decide(same, 1.0, same.p_tost, 0.01) for same in (effect([2.0] * n, [2.0] * n, 0.75) for n in (2, 6, 7))]
    assert words == ["undecided", "undecided", "no difference"]


def test_a_difference_that_is_always_the_same_counts_as_often_as_it_was_seen() -> None:
    """Without spread, a t test would show a difference after two pairs. One test image often causes that."""
    two, eight = effect([2.5] * 2, [2.0] * 2, 0.75, 1e-4), effect([2.5] * 8, [2.0] * 8, 0.75, 1e-4)
    assert (two.p, two.p_wilcoxon, two.p_tost) == (0.5, 0.5, 0.25)
    assert (eight.p, eight.p_tost) == (2 * 2**-8, 2**-8)
    assert (eight.low, eight.high) == (0.5, 0.5)
    assert effect([3.0] * 8, [2.0] * 8, 0.75, 1e-4).p_tost == 1.0


def test_single_precision_is_no_spread() -> None:
    right = np.array([17, 100, 250, 322])
    side, baseline = (100 * (1 - np.float64(np.float32((right - more) / 360))) for more in (1, 0))
    assert np.ptp(side - baseline) > 0
    assert effect(side.tolist(), baseline.tolist(), 0.75, 1e-4).p == 2 * 2**-4


@pytest.mark.parametrize(("n", "difference"), [(0, NAN), (1, -1.0)])
def test_of_too_few_pairs_there_is_no_interval(n: int, difference: float) -> None:
    found = effect([1.0] * n, [2.0] * n, 0.75)
    assert found.n == n
    assert found.difference == pytest.approx(difference, nan_ok=True)
    assert all(map(math.isnan, (found.low, found.high, found.p, found.p_wilcoxon, found.p_tost)))
    assert decide(found, NAN, NAN, 0.01) == "too few pairs"


def test_a_pair_with_a_value_that_is_not_finite_is_left_out() -> None:
    whole, holes = effect([1.0, 2.5, 3.0], [0.0, 1.0, 1.0], 1), effect([1, 2.5, NAN, 3, 9], [0, 1, 1, 1, math.inf], 1)
    assert whole == holes


def test_holm() -> None:
    # 4, 3, 2 and 1 times the p values in order, and none below the one before; 0.03 * 2 makes 0.04 * 1 no smaller.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([NAN, 0.02, NAN, 0.01]) == pytest.approx([NAN, 0.02, NAN, 0.02], nan_ok=True)
    assert holm([]) == []


@pytest.mark.parametrize(
    ("difference", "p_holm", "p_tost", "word"),
    [
        (-1.0, 0.009, 0.9, "lower"),
        (1.0, 0.009, 0.9, "higher"),
        (-0.1, 0.009, 0.001, "lower"),  # small, and shown to be there
        (0.1, 0.011, 0.009, "no difference"),
        (0.1, 0.011, 0.011, "undecided"),
    ],
)
def test_the_word_for_it(difference: float, p_holm: float, p_tost: float, word: str) -> None:
    found = Effect(8, difference, 0, 0, 0.005, 0.005, 0.001, ())
    assert decide(found, p_holm, p_tost, alpha=0.01) == word
