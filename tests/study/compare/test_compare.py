"""Tests ``compare``: pairing, errors, and that every figure comes from the run directories."""

import dataclasses
import math
import random
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.study.compare.compare import compare
from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.runs.metric import Metric
from syncbn.study.report import answer
from syncbn.study.report.symbol_matrix import legend, symbol_matrix
from tests.study.support import run_directories
from tests.study.support.run_directories import by_seed, layer, run, sweep
from tests.support.refuses import refuses

LOCAL, SYNC = by_seed([60.0, 62.5, 61.0, 64.0]), by_seed([6.0, 6.5, 5.0, 7.0])
SAME = by_seed([2.0, 2.2, 1.9, 2.4, 2.1, 2.3])


def near(errors: dict[int, float], *by: float) -> dict[int, float]:
    return {seed: error + step for (seed, error), step in zip(errors.items(), by, strict=True)}


def whole(comparison: Comparison) -> dict[str, Any]:
    """All fields of a comparison, in a form that can be compared."""
    fields = {field.name: getattr(comparison, field.name) for field in dataclasses.fields(comparison)}
    return {name: v.to_csv() if isinstance(v, pd.DataFrame) else v for name, v in fields.items()}


def test_known_numbers(tmp_path: Path) -> None:
    c = compare([sweep(tmp_path / "a", {"sync": SYNC, "local": LOCAL})])
    assert (c.baseline, c.sides, c.conditions, c.axis) == ("local", ["local", "sync"], [""], "")
    assert c.metric == Metric("test/acc", "test error", "%", "lower", "points", 0.0, 100.0)
    assert (c.margin, c.alpha) == (0.75, 0.01)
    (effect,) = c.effects.to_dict("records")
    # -54, -56, -56, -57: mean -55.75, standard deviation sqrt(4.75 / 3), t at 97.5 % and 3 degrees of freedom 3.182446
    assert effect["differences"] == pytest.approx((-54, -56, -56, -57))
    assert effect["difference"] == pytest.approx(-55.75)
    half = 3.182446 * math.sqrt(4.75 / 3) / 2
    assert (effect["low"], effect["high"]) == pytest.approx((-55.75 - half, -55.75 + half))
    assert (effect["n"], effect["verdict"], effect["how"]) == (4, "lower", "2 processes on the CPU")
    local, sync = c.means.to_dict("records")
    assert (local["side"], local["mean"], local["n"]) == ("local", pytest.approx(61.875), 4)
    assert (sync["side"], sync["mean"], sync["sd"]) == ("sync", pytest.approx(6.125), pytest.approx(0.853913))
    assert c.runs["used"].all()
    assert "norm.name: local / sync" in c.differs
    assert "samples that share statistics: 2 / 4" in c.differs
    assert "model: MLP, num_classes=10, depth=4, width=64" in c.constant
    assert "seeds: 0, 1, 2, 3" in c.constant
    assert answer.sentence(c) == "Sync lowers the test error from 61.9 to 6.1 %."
    assert symbol_matrix(c).cells[1].text == "✓ −55.8 [−57.8, −53.7]"
    (few,) = c.problems
    assert "few pairs (at least 4" in few


def test_nothing_differs(tmp_path: Path) -> None:
    sync = near(SAME, 0.1, -0.1, 0.05, -0.05, 0.1, -0.1)
    c = compare([sweep(tmp_path / "a", {"local": SAME, "sync": sync})])
    assert list(c.effects["verdict"]) == ["no difference"]
    assert c.effects["p"][0] > 0.9
    assert answer.sentence(c) == "Sync makes no difference beyond ±0.75 points."
    assert c.problems == []
    same = compare([sweep(tmp_path / "b", {"local": SAME, "sync": SAME})])
    assert (same.effects["p"][0], same.effects["p_tost"][0]) == (1.0, 2**-6)
    wide = compare([tmp_path / "a"], margin=0.05)
    assert list(wide.effects["verdict"]) == ["undecided"]
    assert answer.sentence(wide) == "It is undecided whether sync makes a difference."


def test_a_run_that_is_deleted_is_missed(tmp_path: Path) -> None:
    path = sweep(tmp_path / "a", {"local": LOCAL, "sync": SYNC})
    before = compare([path])
    shutil.rmtree(path / "7")  # sync with seed 3
    after = compare([path])
    assert after.effects["difference"][0] == pytest.approx(-(54 + 56 + 56) / 3)
    assert after.effects["p"][0] != before.effects["p"][0]
    assert after.means["mean"][0] == pytest.approx((60 + 62.5 + 61) / 3)  # local's seed 3 has no partner any more
    assert len(after.curves) == len(before.curves) - 2 * 6
    assert after.cost["n"].sum() == 6
    assert "sync has no finished run with seed 3" in after.problems
    alone = after.runs[~after.runs["used"]]
    why = "no partner: there is no run of sync in its settings with seed 3 (processes on the CPU)"
    assert list(alone["why"]) == [why]
    (path / "6/result.json").write_text((path / "5/result.json").read_text(encoding="utf-8"), encoding="utf-8")
    assert compare([path]).effects["difference"][0] == pytest.approx(-(54 + 56 + 54.5) / 3)


def test_failed_damaged_and_repeated_runs_are_shown(tmp_path: Path) -> None:
    path = sweep(tmp_path / "a", {"local": LOCAL, "sync": SYNC})
    run(path / "8", norm="sync", seed=9, status="failed", error=None)
    run(path / "9", norm="local", seed=8, status="running", error=None)
    run_directories.damage(run(path / "10", norm="sync", seed=8) / "result.json")
    run(path / "11", norm="sync", seed=7, test={"test/acc": math.nan})
    run(path / "12", norm="sync", seed=0, error=6.0, ended="2026-01-02T00:00:00+00:00")
    run(path / "13", norm="sync", seed=1, error=9.0, ended="2026-01-03T00:00:00+00:00")
    c = compare([path])
    rows = c.runs.set_index(c.runs["path"].str.rpartition("/")[2])
    assert len(rows) == 14
    assert list(rows.loc[["8", "9", "10", "11"], "status"]) == ["failed", "running", "no result", "finished"]
    assert not rows.loc[["8", "9", "10", "11", "4", "5"], "used"].any()
    assert rows.loc["4", "why"] == "repeated: a/12 is newer"
    assert rows.loc["11", "why"] == "test/acc is nan"
    assert rows.loc["8", ["side", "condition", "seed"]].tolist() == ["sync", "", 9]
    assert c.effects["differences"][0] == pytest.approx((-54, -53.5, -56, -57))
    text = "\n".join(c.problems)
    for line in (
        "a/8 (sync, seed 9): it failed",
        "a/9 (local, seed 8): it had not ended",
        "a/10 (sync, seed 8): result.json cannot be read",
        "a/11 (sync, seed 7): test/acc is nan",
        "a/5 and a/13 are the same run twice and differ: 6.5, 9",
    ):
        assert line in text
    assert "a/4 and a/12" not in text  # they came out the same


def test_conditions_and_their_axis(tmp_path: Path) -> None:
    for batch in (16, 2, 4):
        options = {"batch_size": batch, "settings": {"optimizer.lr": 0.01 * batch}}
        sweep(tmp_path / str(batch), {"local": LOCAL, "sync": SYNC}, **options)
    c = compare([tmp_path])
    assert c.conditions == ["data.batch_size=2", "data.batch_size=4", "data.batch_size=16"]
    assert c.axis == "data.batch_size"
    assert list(c.effects["at"]) == [2, 4, 16]
    rates = "0.02 at data.batch_size=2, 0.04 at data.batch_size=4, 0.16 at data.batch_size=16"
    assert f"optimizer.lr: {rates}" in c.constant
    assert "samples that share statistics: 2, 4, 16 / 4, 8, 32" in c.differs
    assert c.effects["p_holm"][0] == pytest.approx(3 * c.effects["p"][0])
    two = compare([tmp_path / "2", tmp_path / "4"], margin=60.0)  # points; both rows have the same p values
    alone = compare([tmp_path / "2"], margin=60.0)
    assert list(two.effects["p_tost"]) == pytest.approx([2 * alone.effects["p_tost"][0]] * 2)
    both = compare([tmp_path / "2", tmp_path / "4"], factor="data.batch_size,optimizer.lr")
    assert (both.sides, both.conditions) == (["2", "4"], ["norm.name=local", "norm.name=sync"])
    assert list(both.effects["p_tost"]) == [2 * 2**-4] * 2
    assert list(both.effects["verdict"]) == ["undecided", "undecided"]  # the same four times, twice: too few to show it


def test_sides_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    two = {**run_directories.NORMS["sync"], "group": 2}
    picked = {**run_directories.NORMS["sync"], "group": 4, "batch_size": 8}
    for name, norm in (("world", "sync"), ("two", two), ("picked", picked), ("local", "local")):
        sweep(tmp_path / name, {"local": {}}, devices=8)
        for seed in (0, 1):
            run(tmp_path / name / str(seed), norm=norm, seed=seed, devices=8, error=3.0 + seed)
    c = compare([tmp_path], baseline="sync group=2")
    assert c.sides[0] == "sync group=2"
    assert set(c.sides[1:]) == {"local", "sync group=world", "sync batch_size=8"}


@pytest.mark.parametrize(
    ("factor", "settings_", "sides"),
    [
        ("optimizer.lr", {"optimizer.lr": 0.1}, ["0.05", "0.1"]),
        ("model", {"model._target_": "mine.Net"}, ["MLP", "Net"]),
        ("optimizer", {"optimizer.lr": 0.1, "optimizer.momentum": 0.5}, ["SGD lr=0.05", "SGD lr=0.1"]),
        ("trainer.max_epochs", {"trainer.max_epochs": 9, "scheduler.epochs": 9}, ["3", "9"]),
    ],
)
def test_any_setting_or_group_may_be_the_factor(
    tmp_path: Path, factor: str, settings_: dict[str, Any], sides: list[str]
) -> None:
    sweep(tmp_path, {"local": LOCAL})
    sweep(tmp_path, {"local": SYNC}, settings=settings_)
    c = compare([tmp_path], factor=factor)
    assert sorted(c.sides) == sorted(sides)
    assert abs(c.effects["difference"][0]) == pytest.approx(55.75)


@pytest.mark.parametrize(
    ("factor", "kept"), [("devices", "global"), ("devices", "device"), ("data.batch_size", "global")]
)
def test_two_of_batch_global_batch_and_devices_say_the_third(tmp_path: Path, factor: str, kept: str) -> None:
    sweep(tmp_path, {"local": LOCAL}, batch_size=8, devices=2)
    sweep(tmp_path, {"local": SYNC}, batch_size=4 if kept == "global" else 8, devices=4)
    c = compare([tmp_path], factor=factor)
    assert c.sides == (["2", "4"] if factor == "devices" else ["4", "8"])
    assert c.effects["how"][0] == "processes on the CPU"


def test_what_cannot_change_the_result_is_no_difference(tmp_path: Path) -> None:
    sweep(tmp_path, {"local": LOCAL})
    changed = {"trainer.log_every_n_steps": 1, "data.num_workers": 2, "timeouts.stop": 1.0, "logger.mode": "offline"}
    sweep(tmp_path, {"sync": SYNC}, settings={**changed, "precise_batches": 8, "ckpt_path": "last.ckpt"})
    assert compare([tmp_path]).effects["n"][0] == 4


def test_one_process_and_several_are_never_a_pair(tmp_path: Path) -> None:
    sweep(tmp_path / "one", {"local": SAME, "sync": near(SAME, 0, 0.1, 0, 0, -0.1, 0)}, simulate=2)
    sweep(tmp_path / "ddp", {"local": {0: 2.0}, "sync": {0: 2.9}}, collectives=0.25)
    c = compare([tmp_path])
    (effect,) = c.effects.to_dict("records")
    assert (effect["n"], effect["how"]) == (6, "1 process for 2 devices")
    assert c.confirmations.to_dict("list") == {
        "condition": ["", ""],
        "side": ["local", "sync"],
        "seed": [0, 0],
        "one_process": pytest.approx([2.0, 2.0]),
        "processes": pytest.approx([2.0, 2.9]),
        "difference": pytest.approx([0.0, 0.9], abs=1e-9),
    }
    (line,) = c.problems
    assert line.startswith("1 of 2 runs in one process differ by more than the margin from the same run with a process")
    assert line.endswith("most: sync with seed 0, 2 and 2.9")
    assert list(c.cost["how"]) == ["2 processes on the CPU"] * 2
    assert list(c.cost["collectives"]) == [0.25, 0.25]
    assert set(c.runs[~c.runs["used"]]["why"]) == {"it confirms the run in one process"}
    shutil.rmtree(tmp_path / "ddp")
    assert answer.cost(compare([tmp_path])).startswith("Time per step: not measured")


def test_as_many_confirmations_are_no_effect_of_their_own(tmp_path: Path) -> None:
    """Otherwise Holm's correction would count the same pairs twice."""
    two = {"local": {0: 60.0, 1: 62.5}, "sync": {0: 6.0, 1: 6.5}}
    sweep(tmp_path / "one", two, simulate=2)
    sweep(tmp_path / "ddp", two)
    c = compare([tmp_path])
    assert list(c.effects["how"]) == ["1 process for 2 devices"]
    assert c.effects["p_holm"][0] == c.effects["p"][0]
    assert list(c.cost["n"]) == [2, 2]
    sweep(tmp_path / "more", {"local": {2: 61.0}, "sync": {2: 5.0}})
    assert list(compare([tmp_path]).effects["n"]) == [3, 2]


def test_cost(tmp_path: Path) -> None:
    of_two = {"trainer.accumulate_grad_batches": 2}  # batches a step
    sweep(tmp_path, {"local": {0: 2.0}}, images_per_second=400, settings=of_two)
    sweep(tmp_path, {"local": {1: 2.0}}, images_per_second=500, settings=of_two)
    sweep(tmp_path, {"sync": {0: 2.0, 1: 2.1}}, images_per_second=200, settings=of_two)
    c = compare([tmp_path])
    local, sync = c.cost.to_dict("records")
    assert (local["seconds_per_step"], local["ratio"]) == (pytest.approx((8 / 400 + 8 / 500) / 2), 1.0)
    assert (sync["ratio_low"], sync["ratio_high"], sync["ratio"]) == pytest.approx((2, 2.5, math.sqrt(2 * 2.5)))
    assert math.isnan(sync["collectives"])
    assert sync["pairs"] == 2
    where = "2 processes on the CPU; 2 pairs of runs for each, in brackets the least and the greatest"
    assert answer.cost(c) == f"Time per step relative to local ({where}): sync 2.24× (2.00 to 2.50)."
    assert compare([tmp_path], baseline="sync").cost["ratio"][1] == pytest.approx(1 / sync["ratio"])


def test_conditions_have_a_cost_of_their_own(tmp_path: Path) -> None:
    for batch, speed in ((2, 100), (4, 40)):
        sweep(tmp_path / str(batch), {"local": LOCAL}, batch_size=batch)
        sweep(tmp_path / str(batch), {"sync": SYNC}, batch_size=batch, images_per_second=speed)
    shutil.rmtree(tmp_path / "4/7")
    cost = compare([tmp_path]).cost
    assert list(cost["ratio"]) == pytest.approx([1, 4, 1, 10])
    assert list(cost["pairs"]) == [4, 4, 3, 3]
    assert answer.cost(compare([tmp_path])).endswith(
        "(2 processes on the CPU, the range over conditions; 3 to 4 pairs of runs for each): sync 4.00 to 10.00×."
    )


def test_other_metrics(tmp_path: Path) -> None:
    path = sweep(tmp_path, {"local": SAME | {6: 2.0}, "sync": SYNC | {4: 5.0, 5: 6.0, 6: 6.0}}, precise_error=2.0)
    loss = compare([path], metric="test/loss")
    assert (loss.metric.label, loss.metric.unit, loss.metric.better) == ("test loss", "", "lower")
    assert loss.margin == pytest.approx(0.05 * np.mean([*SAME.values(), 2.0]) / 10)
    assert (loss.effects["verdict"][0], symbol_matrix(loss).cells[1].symbol) == ("higher", "✗")
    precise = compare([path], metric="precise/acc")
    assert precise.metric.label == "test error with population statistics"
    assert precise.effects["verdict"][0] == "no difference"
    speed = compare([path], metric="images_per_second")
    assert speed.metric.better == "higher"


def test_a_metric_without_a_unit_has_a_margin_in_each_condition(tmp_path: Path) -> None:
    """A loss difference of 0.005 is large for a loss of 0.1, and negligible for a loss of 10."""
    bases = {2: 100.0, 16: 1.0}  # percent, of which the loss is a tenth
    for batch, base in bases.items():
        local = by_seed([base, base * 1.01, base * 0.99] * 3)
        off = near(local, *[0.01 * n for n in (14, 15, 16) * 3])
        sweep(tmp_path / str(batch), {"local": local, "sync": off}, batch_size=batch)
    c = compare([tmp_path], metric="test/loss")
    assert list(c.effects["margin"]) == pytest.approx([0.5, 0.005])
    assert math.isnan(c.margin)
    assert list(c.effects["verdict"]) == ["higher", "higher"]
    assert list(c.effects["p_tost"] < 0.01) == [True, False]
    assert [cell.symbol for cell in symbol_matrix(c).cells] == ["✗=", "✗"]
    assert "✓= or ✗= by less than ±5 % of local's mean in the condition" in legend(c)[0]
    asked = compare([tmp_path], metric="test/loss", margin=0.2)
    assert (asked.margin, list(asked.effects["margin"])) == (0.2, [0.2, 0.2])
    sweep(tmp_path / "one", {"local": {0: 1.2}}, batch_size=16, simulate=2)
    (line,) = (line for line in compare([tmp_path], metric="test/loss").problems if "the margin" in line)
    assert "most: local at data.batch_size=16 with seed 0, 0.12 and " in line


REFUSED = [
    ("factor", "optimizer", "all runs have SGD; give runs with another optimizer too, or --factor=norm.group, in"),
    ("factor", "data.nothing", "the runs have no such setting; use one of ", "data, "),
    ("baseline", "syn", "there is no such side; use one of 'local', 'sync'"),
    ("metric", "test/f1", "no run has it; use one of test/acc, test/count, test/loss"),
    ("margin", 0.0, "use a number above 0, in points"),
    ("alpha", 1.0, "use a number between 0 and 1"),
]
NOT_PAIRED = [
    ({"settings": {"optimizer.lr": 0.1}}, "optimizer.lr=0.05 against 0.1; run both with the same, or --factor=norm,"),
    ({"simulate": 2}, "local ran as processes on the CPU, sync as one process on the CPU, and such runs are no pairs"),
    ({"status": "failed", "error": None}, "no run of sync has finished with a result"),
]


@pytest.mark.parametrize("refusal", REFUSED)
def test_what_is_refused(tmp_path: Path, refusal: tuple[Any, ...]) -> None:
    sweep(tmp_path, {"local": {0: 2.0, 1: 2.1}, "sync": {0: 2.0, 1: 2.0}})
    name, value, *words = refusal
    with refuses(f"--{name}", value, *words):
        compare([tmp_path], **{name: value})


@pytest.mark.parametrize(("of_sync", "words"), NOT_PAIRED)
def test_sides_that_are_no_pair_are_refused(tmp_path: Path, of_sync: dict[str, Any], words: str) -> None:
    sweep(tmp_path, {"local": {0: 2.0, 1: 2.1}})
    for seed in (0, 1):
        run(tmp_path / f"sync-{seed}", **{"norm": "sync", "seed": seed, **of_sync})
    with refuses("--factor", "norm", words):
        compare([tmp_path])


def test_seeds_that_never_meet_are_refused(tmp_path: Path) -> None:
    sweep(tmp_path, {"local": {0: 2.0, 1: 2.1}, "sync": {2: 2.0}})
    with refuses("--factor", "norm", "no seed in common: seeds 0, 1 against seed 2"):
        compare([tmp_path])
    with refuses("--factor", "norm", "all runs have local; give runs with another norm too"):
        compare([tmp_path / "0", tmp_path / "1"])


def test_a_side_that_differs_in_more_is_named_where_others_can_be_compared(tmp_path: Path) -> None:
    sweep(tmp_path, {"local": LOCAL, "sync": SYNC})
    sweep(tmp_path, {"none": LOCAL}, settings={"optimizer.lr": 0.01})
    c = compare([tmp_path])
    assert list(c.effects["side"]) == ["sync"]
    assert "local and none differ in more than norm" in c.problems[0]
    assert "optimizer.lr=0.05 against 0.01" in c.problems[0]
    assert symbol_matrix(c).cells[-1].text == "—"


def test_runs_of_other_versions_are_named(tmp_path: Path) -> None:
    sweep(tmp_path, {"local": SAME})
    sweep(tmp_path, {"sync": SAME}, versions={"torch": "2.12.0"})
    torches = "2.12.0 (6 runs), 2.13.0 (6 runs)"
    assert compare([tmp_path]).problems == [f"the runs were not made with the same torch: {torches}"]


def test_which_layers_need_it(tmp_path: Path) -> None:
    few, enough = {"effective_batch": 2.0}, {"effective_batch": 30.0, "device_batch": 512}
    seen = [layer("net.stem", **enough), *(layer(f"net.head.{i}", **few) for i in range(3))]
    sweep(tmp_path / "a", {"local": {0: 9.0, 1: 9.5}}, devices=8)
    sweep(tmp_path / "a", {"sync": {0: 2.0, 1: 2.4}}, devices=8, layers=seen)
    c = compare([tmp_path / "a"])
    assert list(c.layers["layer"]) == ["net.head.0", "net.head.1", "net.head.2", "net.stem"]
    assert list(c.layers["needs"]) == [True, True, True, False]
    assert c.suggestion.startswith("norm=sync norm.only='[\"net.head.*\"]' norm.group=4: ")
    assert "those of 4 devices about 8; 3 of 4 layers need it" in c.suggestion

    # Positions of an image are correlated, so their means spread, and the effective batch is large enough.
    seen = [layer("conv", device_batch=512, effective_batch=25, spread=20)]
    sweep(tmp_path / "b", {"sync": {0: 2.0}, "local": {0: 2.0}}, layers=seen)
    worth = "a device's are worth at least 25 independent samples in conv"
    assert compare([tmp_path / "b"]).suggestion == f"no layer needs shared statistics: {worth}."
    # Without positions, the spread shows that the devices' data differ.
    shards = [layer("fc", device_batch=32, effective_batch=8, spread=spread) for spread in (4, 6)]
    sweep(tmp_path / "c", {"sync": {0: 2.0}, "local": {0: 2.0}}, layers=shards, batch_size=32)
    c = compare([tmp_path / "c"])
    assert list(c.layers["spread"]) == [5.0]  # the mean of two log points
    assert list(c.layers["side"]) == ["sync"]  # behind a layer of per-device statistics devices hardly differ
    assert "norm=sync for all layers: the devices' means differ 5 times as much as by chance" in c.suggestion


@pytest.mark.parametrize("figures", [{"effective_batch": 2.0}, {"effective_batch": 25.0, "spread": 31.0}])
def test_without_shared_statistics_no_layer_is_said_to_do_without(tmp_path: Path, figures: dict[str, float]) -> None:
    """A first layer with per-device statistics hides from later layers that the devices' data differ."""
    enough = {"device_batch": 32, "effective_batch": 30.0}
    seen = [layer("fc.0", device_batch=32, **figures), layer("fc.1", **enough), layer("fc.2", **enough)]
    sweep(tmp_path, {"local": {0: 18.0, 1: 19.0}}, layers=seen, batch_size=32, devices=8)
    sweep(tmp_path, {"sync": {0: 3.4, 1: 3.5}}, batch_size=32, devices=8)
    suggested = compare([tmp_path]).suggestion
    assert suggested.startswith("norm=sync for all layers: ")
    unknown = "which of them alone need it is seen only where statistics are shared: monitor a norm=sync run"
    assert suggested.endswith(f"; {unknown}.")
    assert "norm.only" not in suggested
    assert "norm.group" not in suggested
    sweep(tmp_path, {"sync": {2: 3.4}, "local": {2: 18.5}}, layers=seen, batch_size=32, devices=8)
    assert compare([tmp_path]).suggestion.startswith("norm=sync norm.only='[\"fc.0\"]'")


def test_a_device_is_worth_no_more_than_what_it_holds(tmp_path: Path) -> None:
    seen = [layer("fc", device_batch=32, effective_batch=32.6)]
    sweep(tmp_path, {"local": {0: 2.0}, "sync": {0: 2.0}}, batch_size=32, layers=seen)
    c = compare([tmp_path])
    assert c.suggestion.endswith("a device's are worth at least 32 independent samples in fc.")
    assert list(c.layers["effective_batch"]) == [32.0]


def test_devices_that_follow_the_condition_are_one_series(tmp_path: Path) -> None:
    """Eight images on 2 or 4 devices: the number of devices is part of the condition, not of how a side ran."""
    for devices in (2, 4):
        sweep(tmp_path, {"local": LOCAL, "sync": SYNC}, batch_size=8 // devices, simulate=devices)
    for frame in (compare([tmp_path]).means, compare([tmp_path]).runs):
        assert set(frame["how"]) == {"one process on the CPU"}
    sweep(tmp_path / "same", {"local": LOCAL, "sync": SYNC}, simulate=2)
    assert set(compare([tmp_path / "same"]).means["how"]) == {"1 process for 2 devices"}


def test_a_side_that_was_left_out_on_purpose_is_not_missing(tmp_path: Path) -> None:
    errors = {seed: 2.0 + seed for seed in range(3)}
    sweep(tmp_path, {"local": errors, "sync": errors, "none": errors}, batch_size=2)
    sweep(tmp_path, {"local": errors, "sync": errors}, batch_size=4)
    assert any("none has no finished run at data.batch_size=4" in line for line in compare([tmp_path]).problems)
    assert not any("no finished run" in line for line in compare([tmp_path], sparse=True).problems)
    sweep(tmp_path, {"none": {0: 2.0}}, batch_size=4)  # some seeds are there, so the others are missing
    assert any("none has no finished run" in line for line in compare([tmp_path], sparse=True).problems)


def test_against_sync_the_answer_is_on_local(tmp_path: Path) -> None:
    """Not on a side that synchronizes some layers, although its name begins with sync too."""
    sweep(tmp_path, {"group_norm": SAME, "sync": SYNC, "local": LOCAL})
    some = {**run_directories.NORMS["sync"], "only": ["*head*"]}
    for seed in SYNC:
        run(tmp_path / f"some{seed}", norm=some, seed=seed)
    found = compare([tmp_path], baseline="sync")
    assert any(side.startswith("sync only=") for side in found.sides[1:])
    assert answer.sentence(found).startswith("Local raises the test error")


def test_where_the_data_are_is_no_setting_to_show(tmp_path: Path) -> None:
    sweep(tmp_path, {"local": LOCAL, "sync": SYNC}, settings={"data.root": "/somewhere/images"})
    lines = compare([tmp_path]).constant
    assert any(line.startswith("data: ") for line in lines)
    assert not any("/somewhere" in line for line in lines)


def test_runs_that_fail_alike_are_one_line(tmp_path: Path) -> None:
    """Several runs of a side, at two batch sizes, whose messages differ in a number."""
    sweep(tmp_path, {"local": LOCAL, "sync": SYNC})
    for number, (batch, seed) in enumerate([(2, 7), (2, 8), (4, 7)]):
        path = run(tmp_path / f"failed{number}", norm="sync", seed=seed, batch_size=batch, error=None, status="failed")
        (path / "error.txt").write_text(f"ValueError: got {number + 1} values", encoding="utf-8")
    (line,) = [line for line in compare([tmp_path]).problems if "ValueError" in line]
    where = "3 runs of sync at data.batch_size=2, 4 (seeds 7, 8)"
    assert line == f"{where}: it failed: ValueError: got 1 values, and others like it"


@pytest.mark.parametrize(
    ("worth", "device_batch", "needs"),
    [(2.5, 2048, False), (2.3, 2048, True), (4.5, 2048, False), (4.5, 5, True), (6, 6, False)],
)
def test_few_samples_are_fewer_with_image_positions(
    tmp_path: Path, worth: float, device_batch: int, needs: bool
) -> None:
    """A layer with positions keeps the contrast within an image: the limit is 2.4 there, and 5.7 without positions."""
    seen = [layer("it", device_batch=device_batch, effective_batch=worth)]
    sweep(tmp_path, {"local": LOCAL, "sync": SYNC}, batch_size=min(device_batch, 5), layers=seen, devices=8)
    assert compare([tmp_path]).layers["needs"].tolist() == [needs]


def test_published_figures_are_beside_ours(tmp_path: Path) -> None:
    sweep(tmp_path, {"local": LOCAL, "sync": SYNC}, batch_size=2)
    at, expected = {"data.batch_size": 2}, []
    for more in (
        {"side": "local", "baseline": "sync", "difference": 57.0, "tolerance": 5},
        {"side": "sync", "baseline": "local", "difference": -57.0},
        {"side": "sync", "value": 23.0, "tolerance": 3},
        {"side": "sync", "value": 7.8, "tolerance": 1},
        {"side": "sync", "value": 1.0, "where": {"data.batch_size": 4}},
        {"side": "sync", "value": 1.0, "metric": "precise/acc"},
    ):
        expected.append({"what": "P1", "source": "a paper", "where": at, **more})
    found = compare([tmp_path], expected=expected).expected
    # 7.8 ± 1 meets the interval of 6.125, which is 4.77 to 7.48, and 23 ± 3 does not.
    assert list(found["agrees"]) == ["yes", "yes", "no", "yes", "not comparable"]
    (line,) = [line for line in compare([tmp_path], expected=expected).problems if "does not agree" in line]
    assert line == "P1: 6.13 [4.77, 7.48] % does not agree with the expected 23 ± 3 % (a paper)"
    assert found["published"][0] == "+57 ± 5 points"
    assert found["ours"][0] == "+55.8 [+53.7, +57.8] points"
    assert found["ours"][1] == "-55.8 [-57.8, -53.7] points"
    assert list(found["condition"]) == ["", "", "", "", "data.batch_size=4"]
    with refuses("expected: sides", None, "there is no such key"):
        compare([tmp_path], expected=[{"sides": 3}])
    with refuses("expected: P", None, "give side with value, or side and baseline with either difference or at_most"):
        compare([tmp_path], expected=[{"what": "P", "side": "sync", "difference": 1.0}])


@pytest.mark.parametrize(("value", "tolerance", "answer"), [(6.9, 1.0, "yes"), (7.1, 1.0, "no"), (6.0, None, "")])
def test_one_run_has_a_tolerance_and_no_interval(
    tmp_path: Path, value: float, tolerance: float | None, answer: str
) -> None:
    sweep(tmp_path, {"local": {0: 60.0}, "sync": {0: 6.0}})
    figure = {"what": "P1", "source": "a paper", "side": "sync", "value": value, "tolerance": tolerance}
    assert list(compare([tmp_path], expected=[figure]).expected["agrees"]) == [answer or "not comparable"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Comparison]:
    where = tmp_path_factory.mktemp("many")
    for batch in (2, 4):
        sweep(where, {"local": LOCAL, "sync": SYNC, "none": SAME}, batch_size=batch, layers=[layer("a"), layer("b")])
    run(where / "repeated", norm="sync", seed=0, error=6.5)
    run(where / "failed", norm="sync", seed=7, status="failed", error=None)
    paths = [path for path in where.iterdir() if path.is_dir()]
    return paths, compare(sorted(paths))


@given(st.randoms(use_true_random=False))
@settings(max_examples=5)
def test_the_order_of_paths_does_not_matter(many: tuple[list[Path], Comparison], order: random.Random) -> None:
    paths = order.sample(many[0], len(many[0]))
    assert whole(compare([*paths, paths[0]])) == whole(many[1])


@given(st.permutations(range(4)))
@settings(max_examples=5)
def test_the_order_in_which_seeds_ran_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    where = tmp_path_factory.mktemp("seeds")
    for norm, errors in (("sync", SYNC), ("local", LOCAL)):
        sweep(where / "a", {norm: {seed: errors[seed] for seed in order}})
    found = compare([where])
    expected = compare([sweep(where / "b", {"local": LOCAL, "sync": SYNC})])
    for name in ("effects", "means", "cost", "problems"):
        assert whole(found)[name] == whole(expected)[name]


def test_tests_of_different_checkpoints_are_no_pair_to_believe(tmp_path: Path) -> None:
    """The factor affects only the test. For a factor of training, the checkpoints differ as they should."""
    for seed, name in product(range(2), ("none", "batch")):
        options = {"mode": "test", "adapt.name": name}
        number = 7 if (seed, name) == (0, "batch") else seed
        run(tmp_path / f"{name}{seed}", seed=seed, settings=options, tests=f"outputs/{number}/best.ckpt")
    (line,) = [line for line in compare([tmp_path], factor="adapt").problems if "checkpoint" in line]
    two = "(outputs/0/best.ckpt, outputs/7/best.ckpt)"
    assert line.startswith(f"in 1 of 2 pairs the tests are of two checkpoints {two}")
    run(tmp_path / "again", seed=1, settings=options, tests="outputs/8/best.ckpt", ended="2026-01-02T00:00:00+00:00")
    (line,) = [line for line in compare([tmp_path], factor="adapt").problems if "the newer alone counts" in line]
    two = "(outputs/1/best.ckpt, outputs/8"
    assert f"again have the same settings and seed, but test different checkpoints {two}" in line
    for norm in ("local", "sync"):
        run(tmp_path / "norms" / norm, norm=norm, settings={"mode": "test"}, tests=f"outputs/{norm}/best.ckpt")
    assert not any("checkpoint" in line for line in compare([tmp_path / "norms"], factor="norm").problems)
