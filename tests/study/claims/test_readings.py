"""Tests the reduction of conditions to one number, and the notes on missing numbers and bounds."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from syncbn.study.claims.result import CaseLabel
from tests.study.support.claim_study import BASE as NONE
from tests.study.support.claim_study import CASE, Numbers, found, losses, row, runs, study, sync_row, write
from tests.study.support.claim_study import LESS as BETTER


def ladder(metric: str, **by_side: dict[str, float]) -> Numbers:
    """Metrics of one seed, by side and condition of the first part."""
    return {
        ("one", condition, side): {0: {metric: value}}
        for side, values in by_side.items()
        for condition, value in values.items()
    }


@pytest.mark.parametrize(
    ("how", "numbers"),
    [
        ({"over": "1"}, (4.0, 7.0)),
        ({"over": 1}, (4.0, 7.0)),
        ({"over": "mean"}, (6.0, 8.0)),
        ({"over": "mean", "conditions": [0.1, "10"]}, (7.0, 8.5)),
        ({"over": "best"}, (4.0, 7.0)),
        ({"over": "worst"}, (9.0, 9.0)),
        ({"over": "best", "wants": "higher"}, (9.0, 9.0)),
        ({"over": "worst", "wants": "higher"}, (4.0, 7.0)),
        ({"over": "highest", "usable": 5, "wants": "higher"}, (1.0, 0.1)),  # none has so little: the smallest
        ({"over": "highest", "usable": 8, "wants": "higher"}, (1.0, 10.0)),
        ({"over": "highest", "usable": 8, "conditions": [0.1, 1], "wants": "higher"}, (1.0, 1.0)),
        ({"over": "highest", "usable": 8, "wants": "higher", "against": {"over": "1"}}, (1.0, 7.0)),
        ({"over": "worst", "against": {"over": "best"}}, (9.0, 7.0)),
        ({"over": "10", "less": 0.1}, (4.0, -1.0)),
        ({"over": "mean", "conditions": [1, 10], "less": 0.1}, (1.5, -1.5)),
        ({"over": "10", "less": 0.1, "against": {"less": "1"}}, (4.0, 1.0)),
        ({"over": "worst", "against": {"over": "best", "conditions": ["10"]}}, (9.0, 8.0)),
    ],
)
def test_conditions_become_one_number(tmp_path: Path, how: dict[str, Any], numbers: tuple[float, float]) -> None:
    places = ladder("test/loss", sync={"0.1": 5.0, "1": 4.0, "10": 9.0}, none={"0.1": 9.0, "1": 7.0, "10": 8.0})
    sync = sync_row(runs(tmp_path, places), how)
    assert (sync.value, sync.other) == numbers
    assert sync.n == 1


def test_a_rise_is_of_each_seed_and_asks_for_its_own_clean_run(tmp_path: Path) -> None:
    """Errors of 1 to 3 where it is clean, of 11 to 13 where not; without a seed's clean run there is no pair."""
    numbers = {
        ("one", each, side): {seed: {"test/acc": 1 - (by + seed) / 100} for seed in range(3)}
        for side, steep in (("sync", 10), ("none", 20))
        for each, by in (("1", 1), ("10", 1 + steep))
    }
    case = {"metric": "test/acc", "over": "10", "less": "1"}
    places, made = runs(tmp_path, numbers), study({"plain": case}, sides=["sync"], seeds=3)
    sync = row(found(places, made), "plain", "sync")
    assert (sync.n, sync.planned, sync.what) == (3, 3, "test error less that at 1, %")
    assert (sync.value, sync.value_low, sync.other, sync.effect) == pytest.approx((10.0, 10.0, 20.0, 10.0))
    shutil.rmtree(tmp_path / "one" / "1" / "sync" / "2")
    write(tmp_path / "one" / "1" / "sync" / "2", test={"test/loss": 3})
    finding = found(places, made)
    assert (row(finding, "plain", "sync").n, row(finding, "plain", "sync").planned) == (2, 3)
    assert "plain: 1 of 3 runs of one/1/sync have no test/acc" in finding.problems
    smoke = made | {"budget": "smoke"}
    assert row(found(places, smoke), "plain", "sync").planned == 0
    left_out = "plain: budget smoke leaves out what it asks for, so it is not run (sync at 1; none at 1)"
    assert left_out in found(places, smoke).left_out
    elsewhere = {"metric": "test/acc", "part": "other", "over": "a", "against": {"part": "one", "over": "0.1"}}
    there = study({"plain": elsewhere}, sides=["sync"], seeds=3) | {"budget": "smoke"}
    assert row(found(places, there), "plain", "sync").planned == 0


def test_a_magnitude_counts_either_way(tmp_path: Path) -> None:
    places = ladder("gradients/decades", sync={"0.1": -0.5}, none={"0.1": -4.0})
    case = {"metric": "gradients/decades", "magnitude": True}
    sync = sync_row(runs(tmp_path, places), case)
    assert (sync.value, sync.other, sync.effect) == (0.5, 4.0, 3.5)


def test_what_is_usable_is_an_error(tmp_path: Path) -> None:
    case = {"metric": "test/acc", "over": "highest", "usable": 10, "wants": "higher", "effect": "ratio"}
    places = ladder("test/acc", sync={"0.1": 0.95, "1": 0.9, "10": 0.91}, none={"0.1": 0.95, "1": 0.7, "10": 0.1})
    sync = sync_row(runs(tmp_path, places), case)
    assert (sync.value, sync.other, sync.effect, sync.unit) == (10.0, 0.1, pytest.approx(100.0), "")
    assert sync.what == "largest condition with test error of 10 % at most"
    assert sync.note == "sync: 1 of 1 seed could use the largest value tried; so the answer cannot be no"
    nowhere = {("one", each, "local"): {0: {"test/acc": 0.1}} for each in ("0.1", "1", "10")}
    nowhere |= {("one", each, "none"): {0: {"test/acc": 0.95 - 0.5 * (each != "0.1")}} for each in ("0.1", "1", "10")}
    shutil.rmtree(tmp_path)
    local = row(found(runs(tmp_path, nowhere), study({"plain": case})), "plain", "local")
    assert local.note == (
        "local: 1 of 1 seed could use no value and count with the smallest; so the answer cannot be yes"
    )
    assert local.value == 0.1


def test_against_another_metric_of_another_part(tmp_path: Path) -> None:
    """Compares adapted statistics with the baseline's, and sync with local by the case's own metric."""
    numbers = {
        ("one", "0.1", "sync"): {0: {"adapted/acc": 0.8}, 1: {"adapted/acc": 0.9}},
        ("one", "0.1", "local"): {0: {"adapted/acc": 0.7}, 1: {"adapted/acc": 0.9}},
        ("other", "b", "group_norm"): {0: {"corrupted/acc": 0.6}, 1: {"corrupted/acc": 0.7}},
    }
    against = {"side": "group_norm", "metric": "corrupted/acc", "part": "other", "over": "b"}
    finding = found(runs(tmp_path, numbers), study({"plain": {"metric": "adapted/acc", "against": against}}))
    sync = row(finding, "plain", "sync")
    assert sync.against == "group_norm"
    assert (sync.value, sync.other, sync.effect) == pytest.approx((15.0, 35.0, 20.0))
    assert (finding.versus[0].value, finding.versus[0].other) == pytest.approx((15.0, 20.0))


def test_those_who_did_not_get_there_count_with_what_they_trained(tmp_path: Path) -> None:
    reached = [{"target/steps": 100.0, "target/reached": 1}, {"target/steps": 400.0, "target/reached": 0}]
    numbers = {
        ("one", "0.1", "none"): dict(enumerate([reached[1], reached[0], reached[1]])),
        ("one", "0.1", "sync"): dict(enumerate([reached[0]] * 3)),
    }
    case = {"metric": "target/steps", "effect": "ratio", "at_least": 1.25, "what": "steps to 95 %"}
    sync = sync_row(runs(tmp_path, numbers), case)
    assert sync.note == (
        "none: 2 of 3 runs missed the target and count with the steps they trained; so the answer cannot be no"
    )
    assert (sync.n, sync.other) == (3, 300.0)


def test_a_condition_that_the_budget_leaves_out_leaves_the_case_open(tmp_path: Path) -> None:
    places = losses(tmp_path, none=NONE, sync=BETTER)
    cases = {"left_out": {"when": "so"}, "mean": {"when": "on the whole", "over": "mean"}}
    finding = found(places, study(cases, sides=["sync"]) | {"budget": "smoke"})
    assert [(each.n, each.says, math.isnan(each.effect)) for each in finding.rows] == [(0, "open", True)] * 2
    assert finding.verdicts == {"sync": "not run"}
    left_out = "budget smoke leaves out what it asks for, so it is not run (sync at"
    assert [line for line in finding.left_out if line.startswith(f"left_out: {left_out} 0.1")]
    assert [line for line in finding.left_out if line.startswith(f"mean: {left_out} 0.1")]
    assert f"mean: {left_out} 0.1, 1; none at 0.1, 1)" in finding.left_out
    assert not any("10" in line for line in finding.left_out)


def test_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    places, made = losses(tmp_path, none=NONE, sync=BETTER), study(sides=["sync"])
    at = tmp_path / "one" / "0.1"
    assert (row(found(places, made), "plain", "sync").n, found(places, made).verdicts) == (8, {"sync": "holds"})
    shutil.rmtree(at / "sync" / "7")
    shutil.rmtree(at / "none" / "6")
    for seed, parts in {
        "5": {"status": "failed"},
        "4": {"test": {"test/acc": 0.9}},
        "3": {"test": {"test/loss": 0}},
    }.items():
        shutil.rmtree(at / "sync" / seed)
        write(at / "sync" / seed, **parts)
    shutil.rmtree(at / "sync" / "2")
    write(at / "sync" / "2", test={"test/loss": math.inf}, diverged=1)
    finding = found(places, study({"plain": {"effect": "ratio", "at_least": 1.1}}, sides=["sync"]))
    assert row(finding, "plain", "sync").n == 2
    for line in (
        "one/0.1/sync: 1 run missing (7)",
        "one/0.1/none: 1 run missing (6)",
        "one/10/local: 8 runs missing (0, 1, 2, 3, 4, 5, 6, 7)",
        "one/0.1/sync/5: it failed",
        "plain: 1 of 6 runs of one/0.1/sync have no test/loss",
        "plain, sync: seed 2: inf against 9 makes no ratio: not counted",
        "plain, sync: seed 3: 0 against 10.5 makes no ratio: not counted",
    ):
        assert line in finding.problems
    assert (finding.runs, finding.finished, finding.diverged, finding.seeds) == (5 * 4 * 8, 13, 1, 8)


def test_a_run_as_processes_is_no_pair_of_its_own(tmp_path: Path) -> None:
    made = study(sides=["sync"], seeds=1)
    made["parts"]["one"] |= {"settings": ["simulate=2"], "confirm": {"seeds": 1}}
    places = losses(tmp_path, none=[5.0], sync=[4.0])
    write(tmp_path / "one" / "0.1" / "sync" / "0-processes", test={"test/loss": 100.0})
    finding = found(places, made)
    assert (row(finding, "plain", "sync").n, row(finding, "plain", "sync").value) == (1, 4.0)
    assert "one/0.1/none: 1 run missing (0-processes)" in finding.problems


def test_no_run_at_all(tmp_path: Path) -> None:
    finding = found(tmp_path, study({"plain": CASE}))
    assert finding.verdicts == {"local": "not run", "sync": "not run"}
    assert finding.plots[0].frame.empty


def test_the_limits_of_a_metric(tmp_path: Path) -> None:
    by_metric = {"test/acc": 0.9, "test/loss": 1.0, "fit/gap": -0.5}
    places = runs(tmp_path, {("one", each, "sync"): {0: by_metric} for each in ("0.1", "1", "10")})
    cases: dict[str, dict[str, Any]] = {
        "error": {"metric": "test/acc"},
        "rise": {"metric": "test/acc", "less": "1"},
        "highest": {"metric": "test/acc", "over": "highest", "usable": 10, "wants": "higher"},
        "loss": {"metric": "test/loss"},
        "gap": {"metric": "fit/gap"},
        "size": {"metric": "fit/gap", "magnitude": True},
    }
    made = study({name: case | {"when": name, "short": f"by {name}"} for name, case in cases.items()}, source="A paper")
    finding = found(places, made)
    assert finding.source == "A paper"
    assert finding.labels == {
        "error": CaseLabel("by error", 0.0, 100.0),
        "rise": CaseLabel("by rise", -100.0, 100.0),
        "highest": CaseLabel("by highest", 0.0, None),
        "loss": CaseLabel("by loss", 0.0, None),
        "gap": CaseLabel("by gap", None, None),
        "size": CaseLabel("by size", 0.0, None),
    }
    (plot,) = finding.plots
    assert (plot.least, plot.most) == (0.0, 100.0)


def test_runs_that_failed_for_one_reason_are_one_line(tmp_path: Path) -> None:
    for seed in range(5):
        write(tmp_path / "one" / "0.1" / "sync" / str(seed), status="failed")
    write(tmp_path / "one" / "0.1" / "none" / "0", status="running")
    sole, several, *missing = found(tmp_path, study(seeds=5)).problems
    names = "one/0.1/sync/0, one/0.1/sync/1, one/0.1/sync/2 and 2 more"
    assert several == f"5 runs: it failed ({names})"
    assert sole.startswith("one/0.1/none/0: ")
    assert all("missing" in line for line in missing)
