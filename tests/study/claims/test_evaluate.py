"""Tests the results besides the verdicts: published figures, plot data, and lines for the terminal."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from syncbn.study.claims.plot_data import SMALLEST
from syncbn.study.claims.report import page
from syncbn.study.claims.result import Published
from syncbn.study.compare.paired_tests import mean_interval
from tests.study.support.claim_study import PLOT, found, losses, runs, study, write

OF_SYNC, TWICE = {"case": "plain", "side": "sync"}, "2.00 times [1.90 to 2.10]"
NONE, SYNC = [10.0, 11.0, 9.0], [5.0, 5.4, 4.6]


@pytest.mark.parametrize(
    ("figure", "ours", "agrees"),
    [
        (OF_SYNC | {"value": 2.1, "tolerance": 0.11}, TWICE, "yes"),
        (OF_SYNC | {"value": 1.9, "tolerance": 0.11}, TWICE, "yes"),
        (OF_SYNC | {"value": 2.2, "tolerance": 0.15}, TWICE, "open"),
        (OF_SYNC | {"value": 1.8, "tolerance": 0.15}, TWICE, "open"),
        (OF_SYNC | {"value": 1.8, "tolerance": 0.05}, TWICE, "no"),
        (OF_SYNC | {"value": 2.2}, TWICE, "no"),
        (OF_SYNC, TWICE, ""),
        (OF_SYNC | {"of": "value", "value": 5.5}, "5.00 [4.01 to 5.99]", "open"),
        (OF_SYNC | {"of": "value", "value": 5}, "5.00 [4.01 to 5.99]", "yes"),
        (OF_SYNC | {"of": "other", "value": 5.5}, "10.0 [7.5 to 12.5]", "no"),
        ({"case": "plain", "side": "local", "value": 2}, "not measured", ""),
        ({}, "not measured", ""),
    ],
)
def test_a_figure_agrees_where_our_mean_is_within_its_tolerance(
    tmp_path: Path, figure: dict[str, Any], ours: str, agrees: str
) -> None:
    said = {"what": "steps", "published": "2.33 times", "source": "a paper"}
    made = study({"plain": {"effect": "ratio", "at_least": 1.25}}, literature=[said | figure])
    (beside,) = found(losses(tmp_path, none=NONE, sync=SYNC), made).published
    assert beside == Published("steps", "2.33 times", "a paper", ours, agrees)


def test_a_plot_over_conditions(tmp_path: Path) -> None:
    of_sync = {seed: {"test/acc": 1 - value / 100, "clean/acc": 0.9} for seed, value in enumerate(SYNC)}
    numbers = {
        ("one", "10", "sync"): of_sync,
        ("one", "0.1", "none"): {0: {"test/acc": 0.5}, 1: {"test/acc": math.nan}},
    }
    by_series = PLOT | {"series": {"dirty": "test/acc", "clean": "clean/acc"}, "sides": ["sync"], "metric": None}
    words = PLOT | {"part": "other", "x_log": True, "level": 90, "level_label": "chance"}
    drawn = found(runs(tmp_path, numbers), study(plots=[PLOT, by_series, words])).plots
    assert [each.name for each in drawn] == ["one", "one", "other"]
    assert (drawn[0].title, drawn[0].x, drawn[0].y, drawn[0].x_log) == ("Errors", "rate", "error, %", False)
    none, sync = drawn[0].frame.to_dict("records")
    assert (none["side"], none["x"], none["n"], none["mean"]) == ("none", 0.1, 1, 50.0)
    assert math.isnan(none["low"])
    low, high = mean_interval(SYNC)
    assert (sync["x"], sync["n"], sync["panel"], sync["series"]) == (10.0, 3, "", "")
    assert (sync["mean"], sync["low"], sync["high"]) == pytest.approx((5.0, low, high))
    assert drawn[1].frame[["side", "series"]].to_numpy().tolist() == [["sync", "dirty"], ["sync", "clean"]]
    assert (drawn[2].level, drawn[2].level_label, drawn[2].x_log) == (90.0, "chance", True)


def test_conditions_that_are_words(tmp_path: Path) -> None:
    numbers = {("other", each, "sync"): {0: {"test/acc": 0.5}} for each in "ab"}
    (drawn,) = found(runs(tmp_path, numbers), study(plots=[PLOT | {"part": "other"}])).plots
    assert drawn.frame["x"].tolist() == ["a", "b"]


def test_a_plot_over_numbers_in_names(tmp_path: Path) -> None:
    numbers = {("one", "1", "sync"): {0: {"corrupted/acc_severity1": 0.9, "corrupted/acc_severity5": 0.4}}}
    asked = {"kind": "numbers", "condition": 1, "at": [1, 5], "metric": "corrupted/acc_severity{x}"}
    (drawn,) = found(runs(tmp_path, numbers), study(plots=[PLOT | asked])).plots
    assert drawn.frame[["side", "x", "mean"]].to_numpy().tolist() == [
        ["sync", 1.0, pytest.approx(10.0)],
        ["sync", 5.0, pytest.approx(60.0)],
    ]


def test_a_plot_over_layers(tmp_path: Path) -> None:
    """Only the first recorded step counts, with the geometric mean over seeds; a norm of 0 is the smallest number."""
    for seed, norms in enumerate(([1e-3, 1.0], [1e-5, 4.0])):
        at = tmp_path / "one" / "1" / "sync" / str(seed)
        write(at, test={"test/acc": 0.5})
        rows = ["step,layer,depth,norm,weight_norm"]
        for step, of_step in ((0, norms), (50, [0, norms[1]])):
            rows += [f"{step},net.{i},{i},{norm},1" for i, norm in enumerate(of_step)]
        (at / "gradients.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    asked = {
        "kind": "layers",
        "conditions": ["1", "10"],
        "y_log": True,
        "part": "one",
        "title": "t",
        "x": "x",
        "y": "y",
    }
    (drawn,) = found(tmp_path, study(plots=[asked])).plots
    first, last = drawn.frame.to_dict("records")
    assert (first["panel"], first["side"], first["x"], first["n"]) == ("1", "sync", 0.0, 2)
    assert (first["mean"], last["mean"]) == pytest.approx((1e-4, 2.0))
    low, high = np.exp(mean_interval(np.log([1.0, 4.0]).tolist()))
    assert (last["low"], last["high"]) == pytest.approx((low, high))
    assert stats.gmean([1.0, 4.0]) == pytest.approx(last["mean"])
    (ended,) = found(tmp_path, study(plots=[asked | {"look": "last"}])).plots
    assert ended.frame["mean"].tolist() == pytest.approx([SMALLEST, 2.0], rel=1e-6)


def test_lines_for_the_terminal(tmp_path: Path) -> None:
    worse = [value + 3 + 0.1 * place for place, value in enumerate(NONE * 3)]
    none = [value + 0.01 * place for place, value in enumerate(NONE * 3)]
    made = study(seeds=9, number=8, text="Short", sides=["local", "sync", "group_norm"])
    finding = found(losses(tmp_path, none=none, local=none, sync=worse), made)
    made = study(seeds=9, text="A longer claim")
    lines = list(page.lines([finding, found(tmp_path, made)]))
    assert lines[0] == "With synchronized batch norm, none of 2 claims holds and 2 fail (8 and 1)."
    assert lines[1] == "Compared with per-device batch norm, it is worse in claims 8 and 1."
    heads, short, longer, legend = lines[3:7]
    assert heads.split() == ["local", "sync", "group_norm", "sharing", "pays"]
    columns = [heads.index(head) for head in ("local", "sync", "group_norm", "sharing pays")]
    assert short.startswith("8 Short ")
    assert longer.startswith("1 A longer claim ")
    assert [short[at] for at in columns] == ["✗", "✗", "—", "✗"]
    assert [longer[at] for at in columns[:2]] == ["✗", "✗"]
    assert legend.startswith("✓ holds, ")
    assert "! 8. Short; 1. A longer claim: one/1/none: 9 runs missing (0, 1, 2, 3, 4, 5, 6, 7, 8)" in lines
