"""Tests the rule's answers for known numbers against scipy's tests of the same numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from syncbn.study.compare.paired_tests import mean_interval
from tests.study.support.claim_study import BASE as NONE
from tests.study.support.claim_study import LESS as BETTER
from tests.study.support.claim_study import by_seed, errors, found, losses, row, runs, study, sync_row

NOISE = [0.9, 1.2, 0.8, 1.1, 1.0, 0.7, 1.3, 1.05]
NEAR = [value - by for value, by in zip(NONE, NOISE, strict=True)]  # by 1, more or less
SAME = [value - 0.01 * by for value, by in zip(NONE, NOISE, strict=True)]  # by a hundredth


def one_sided(e: list[float], d: float) -> tuple[float, float]:
    tests = [stats.ttest_rel(e, [d] * len(e), alternative=way) for way in ("greater", "less")]
    return float(tests[0].pvalue), float(tests[1].pvalue)


def test_a_difference_is_tested_against_what_is_needed(tmp_path: Path) -> None:
    finding = found(losses(tmp_path, none=NONE, local=SAME, sync=NEAR), study())
    e = {side: np.subtract(NONE, of).tolist() for side, of in (("local", SAME), ("sync", NEAR))}
    yes, no = zip(one_sided(e["local"], 1.0), one_sided(e["sync"], 1.0), strict=True)
    local, sync = row(finding, "plain", "local"), row(finding, "plain", "sync")
    assert 2 * yes[1] < 1  # so that Holm's correction is visible: the smaller p is doubled, the larger stays
    assert sync.p_yes == pytest.approx(2 * yes[1])
    assert local.p_yes == pytest.approx(max(yes[0], 2 * yes[1]))
    assert local.p_no == pytest.approx(2 * no[0])
    assert sync.p_no == pytest.approx(max(no[1], 2 * no[0]))
    assert (local.says, sync.says) == ("no", "open")
    assert sync.effect == pytest.approx(np.mean(NOISE))
    assert (sync.low, sync.high) == pytest.approx(mean_interval(e["sync"]))
    assert (sync.value, sync.other) == pytest.approx((np.mean(NEAR), np.mean(NONE)))
    assert (sync.value_low, sync.value_high) == pytest.approx(mean_interval(NEAR))
    assert (sync.other_low, sync.other_high) == pytest.approx(mean_interval(NONE))
    assert (sync.n, sync.needed, sync.is_ratio, sync.against, sync.unit) == (8, 1.0, False, "none", "")
    assert finding.verdicts == {"local": "does not hold", "sync": "not decided by 8 seeds"}


@pytest.mark.parametrize(("wants", "sign"), [("lower", 1), ("higher", -1)])
def test_a_ratio_is_tested_by_its_log(tmp_path: Path, wants: str, sign: int) -> None:
    case = {"effect": "ratio", "at_least": 1.25, "wants": wants}
    finding = found(losses(tmp_path, none=NONE, sync=BETTER), study({"plain": case}, sides=["sync"]))
    sync, e = row(finding, "plain", "sync"), (sign * (np.log(NONE) - np.log(BETTER))).tolist()
    assert (sync.p_yes, sync.p_no) == pytest.approx(one_sided(e, math.log(1.25)))
    assert sync.effect == pytest.approx(stats.gmean(NONE) ** sign / stats.gmean(BETTER) ** sign)
    assert (sync.low, sync.high) == pytest.approx([math.exp(end) for end in mean_interval(e)])
    assert (sync.is_ratio, sync.needed) == (True, 1.25)
    assert finding.verdicts == {"sync": "holds" if sign == 1 else "does not hold"}


@pytest.mark.parametrize(
    ("of_sync", "verdict"),
    [
        ([BETTER, BETTER, BETTER], "holds"),
        ([BETTER, SAME, BETTER], "holds only at first and at last"),
        ([BETTER, SAME, NEAR], "holds only at first; not decided at last by 8 seeds"),
        ([SAME, SAME, SAME], "does not hold"),
        ([NEAR, NEAR, NEAR], "not decided by 8 seeds"),
        ([NEAR, NEAR[:3], NEAR[:5]], "not decided by 3 to 8 seeds (so far, by 3 to 5 of 8 seeds)"),
        ([SAME, NEAR, NEAR], "not decided by 8 seeds between and at last; does not hold at first"),
        ([[], [], [9.0]], "not decided by 1 seed; not run at first and between (so far, by 0 to 1 of 8 seeds)"),
        ([[], [], []], "not run"),
        ([BETTER, BETTER[:7], BETTER], "holds (so far, by 7 of 8 seeds)"),
    ],
)
def test_what_a_sides_cases_come_to(tmp_path: Path, of_sync: list[list[float]], verdict: str) -> None:
    conditions = dict(zip(("0.1", "1", "10"), of_sync, strict=True))
    numbers = {("one", each, "sync"): by_seed("test/loss", of) for each, of in conditions.items()}
    numbers |= {("one", each, "none"): by_seed("test/loss", NONE) for each in conditions}
    whens = zip(("at first", "between", "at last"), conditions, strict=True)
    cases = {f"case{over}": {"when": when, "over": over, "sides": ["sync"]} for when, over in whens}
    finding = found(runs(tmp_path, numbers), study(cases))
    assert finding.verdicts == {"local": "not asked", "sync": verdict}


@pytest.mark.parametrize(
    ("pairs", "by", "p", "says"),
    [
        (8, 3.0, (2.0**-8, 1.0), "yes"),
        (6, 3.0, (2.0**-6, 1.0), "open"),  # too few to show it at 0.01
        (8, 0.5, (1.0, 2.0**-8), "no"),
        (8, 1.0, (1.0, 1.0), "open"),  # exactly the required effect
        (1, 3.0, (math.nan, math.nan), "open"),
    ],
)
@pytest.mark.parametrize("effect", ["difference", "ratio"])
def test_one_effect_in_all_pairs(
    tmp_path: Path, pairs: int, by: float, p: tuple[float, float], says: str, effect: str
) -> None:
    """Differences of single-precision numbers are equal up to rounding."""
    base = np.array(NONE[:pairs])
    better = base - by if effect == "difference" else base / math.exp(by)
    case = {"effect": effect, "at_least": 1.0 if effect == "difference" else math.e}
    places = losses(tmp_path, none=base.tolist(), sync=better.astype(np.float32).astype(float).tolist())
    sync = sync_row(places, case)
    assert (sync.p_yes, sync.p_no) == pytest.approx(p, nan_ok=True)
    assert (sync.says, sync.n) == (says, pairs)
    assert sync.effect == pytest.approx(by if effect == "difference" else math.exp(by), rel=1e-5)


@pytest.mark.parametrize(("at_most", "says"), [(8.5, "yes"), (6.5, "open"), (4.0, "no")])
def test_a_side_has_to_be_good_as_well_as_better(tmp_path: Path, at_most: float, says: str) -> None:
    """The norm is better by 3 to 3.7, while 1 is required; its own mean is 6.7."""
    sync = sync_row(losses(tmp_path, none=NONE, sync=BETTER), {"at_most": at_most})
    by_effect, above = one_sided(np.subtract(NONE, BETTER).tolist(), 1.0), one_sided(BETTER, at_most)
    both = max(by_effect[0], above[1]), min(1.0, 2 * min(by_effect[1], above[0]))
    assert (sync.p_yes, sync.p_no) == pytest.approx(both)
    assert (sync.at_most, sync.says) == (at_most, says)


def test_a_side_that_is_good_alike_in_all_pairs(tmp_path: Path) -> None:
    """The side's own numbers are equal up to rounding, so the sign test applies."""
    alike = [5 + 1e-7 * place for place in range(8)]
    places = losses(tmp_path, none=NONE, sync=alike)
    for at_most, p_own in ((5.5, (2.0**-8, 1.0)), (4.5, (1.0, 2.0**-8)), (5.0, (1.0, 1.0))):
        sync = sync_row(places, {"at_most": at_most})
        p_yes, p_no = one_sided(np.subtract(NONE, alike).tolist(), 1.0)
        assert (sync.p_yes, sync.p_no) == pytest.approx((max(p_yes, p_own[0]), min(1.0, 2 * min(p_no, p_own[1]))))


def test_what_has_no_pairs_is_of_the_family(tmp_path: Path) -> None:
    """Holm's correction counts all rows of the rule, including rows that were not run."""
    alone = sync_row(losses(tmp_path, none=NONE, local=NEAR, sync=BETTER), {})
    finding = found(tmp_path, study({"plain": {"when": "here"}, "late": {"when": "there", "over": "10"}}))
    sync, late = row(finding, "plain", "sync"), row(finding, "late", "sync")
    assert sync.p_yes == pytest.approx(4 * alone.p_yes)
    assert (late.n, late.says, math.isnan(late.p_yes), math.isnan(late.p_no)) == (0, "open", True, True)
    p = stats.ttest_rel(NEAR, BETTER).pvalue
    assert finding.versus[0].p == pytest.approx(2 * p)
    assert (finding.versus[1].word, math.isnan(finding.versus[1].p)) == ("not run", True)


def test_a_set_in_which_nothing_differs_never_holds(tmp_path: Path) -> None:
    """Twenty claims about noise with three rows each: 0.2 hold by chance if 0.01 covers all rows of a claim."""
    holds, worse = 0, 0
    for draw in range(20):
        noise = np.random.default_rng(draw).normal(10, 1, (4, 8))
        names = ("none", "local", "sync", "group_norm")
        places = losses(tmp_path / str(draw), **{name: of.tolist() for name, of in zip(names, noise, strict=True)})
        finding = found(places, study({"plain": {"at_least": 0}}, sides=names[1:]))
        holds += any("holds" in verdict for verdict in finding.verdicts.values())
        worse += len(finding.worse)
    assert holds <= 1
    assert worse <= 1


def test_synchronized_statistics_that_do_worse_are_told(tmp_path: Path) -> None:
    case = {"when": "with label noise of 40 %", "metric": "test/acc"}
    sync = [value + 3 + 0.1 * place for place, value in enumerate(NONE)]
    places = errors(tmp_path, sync=sync, local=NONE, none=NONE)
    finding = found(places, study({"noise": case, "again": {**case, "when": "again"}}))
    e = np.subtract(NONE, sync)
    one = finding.versus[0]
    assert one.p == pytest.approx(2 * stats.ttest_1samp(e, 0).pvalue)  # two cases
    assert (one.word, one.n, one.what, one.unit) == ("worse", 8, "test error, %", "%")
    low, high = mean_interval((-e).tolist())
    assert (one.effect, one.low, one.high) == pytest.approx((e.mean(), -high, -low))
    assert finding.worse[0] == (
        "With label noise of 40 %, synchronized statistics are worse than per-device ones by "
        f"{-e.mean():.2f} points [{low:.2f} to {high:.2f}]: test error {np.mean(sync):.2f} against {np.mean(NONE):.2f} "
        "%, 8 seeds."
    )
    assert finding.worse[1].startswith("Again, synchronized statistics are worse")


def more(times: float) -> list[float]:
    return [value * times * 1.01**place for place, value in enumerate(NONE)]


@pytest.mark.parametrize(
    ("sync", "word", "told"),
    [
        (more(2), "worse", "by a factor of 2.071 [2.029 to 2.114]: steps to 95 % "),
        (BETTER, "better", ""),
        (NONE, "no difference", ""),
        (more(1.1), "worse", ", less than the 1.25 that would matter: steps to 95 % "),
        ([value * (1 + 0.2 * (-1) ** place) for place, value in enumerate(NONE)], "not decided", ""),
    ],
)
def test_synchronized_against_per_device_by_ratio(tmp_path: Path, sync: list[float], word: str, told: str) -> None:
    case = {"effect": "ratio", "at_least": 1.25, "what": "steps to 95 %"}
    finding = found(losses(tmp_path, none=NONE, local=NONE, sync=sync), study({"plain": case}))
    (one,) = finding.versus
    assert one.word == word
    assert one.effect == pytest.approx(stats.gmean(NONE) / stats.gmean(sync))
    assert len(finding.worse) == bool(told)
    assert all(
        told in line and line.startswith("Synchronized statistics are worse than per-device ones by ")
        for line in finding.worse
    )
    assert all(line.endswith(", 8 seeds.") for line in finding.worse)


def test_a_case_that_is_about_one_of_them_has_no_versus(tmp_path: Path) -> None:
    assert not found(losses(tmp_path, none=NONE, sync=BETTER), study({"plain": {"sides": ["sync"]}})).versus


def test_a_case_that_is_only_measured_is_no_part_of_the_verdict(tmp_path: Path) -> None:
    numbers = losses(tmp_path, none=NONE, local=SAME, sync=BETTER)
    case, beside = {"when": "here"}, {"when": "there", "at_least": 0.1, "counts": False}
    judged, both = found(numbers, study({"plain": case})), found(numbers, study({"plain": case, "beside": beside}))
    assert row(both, "plain", "sync") == row(judged, "plain", "sync")  # Holm's correction is for as many rows
    assert row(both, "beside", "local").says == row(both, "beside", "sync").says == "measured"
    assert row(both, "beside", "sync").effect == row(both, "plain", "sync").effect
    assert both.verdicts == judged.verdicts == {"local": "does not hold", "sync": "holds"}
    assert [one.case for one in both.versus] == ["plain"]


def test_synchronized_statistics_that_do_better_are_told(tmp_path: Path) -> None:
    finding = found(losses(tmp_path, none=NONE, local=NONE, sync=BETTER), study({"plain": {"when": "so"}}))
    (one,) = finding.versus
    assert (one.word, finding.worse) == ("better", [])
    e = np.subtract(NONE, BETTER)
    start = f"So, synchronized statistics are better than per-device ones by {e.mean():.2f} ["
    assert finding.better[0].startswith(start)
