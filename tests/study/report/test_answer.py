"""Tests the first screen of a comparison: its sentence, its matrix of symbols, and its line on the cost."""

import re
from dataclasses import replace
from math import inf

import pytest

from syncbn.study.compare.comparison import Comparison
from syncbn.study.report import answer
from syncbn.study.report.symbol_matrix import SYMBOLS, legend, symbol_matrix
from tests.study.support import comparisons
from tests.study.support.comparisons import NAN, ONE, PROCESSES, frame, measured

BATCH = "data.batch_size"
HIGH = [60.0, 62.5, 61.0, 64.0, 61.5, 62.0, 63.0, 60.5]
LOW = [6.0, 6.5, 5.0, 7.0, 6.2, 5.8, 6.1, 6.44]
SPREAD = [-12.0, 9.0, 4.0, -8.0, 11.0, -6.0, 7.0, -5.0]


def sweep(by_batch: dict[int, tuple[list[float], ...]], sides: tuple[str, ...] = ("local", "sync")) -> Comparison:
    """A comparison over batch sizes, from the values of each side."""
    values = {
        (f"{BATCH}={batch}", side, ONE): of_one
        for batch, every in by_batch.items()
        for side, of_one in zip(sides, every, strict=True)
    }
    return measured(values, axis=BATCH)


def moved(values: list[float], by: float, spread: float = 0.01) -> list[float]:
    return [value + by + spread * ((at % 3) - 1) for at, value in enumerate(values)]


def undecided(values: list[float]) -> list[float]:
    return [value + step for value, step in zip(values, SPREAD, strict=True)]


SENTENCES = {
    "With 2 samples on each device, sync lowers the test error from 61.8 to 6.13 %; "
    "with 16 it makes no difference beyond ±0.75 points.": {2: (HIGH, LOW), 16: (LOW, moved(LOW, 0.0))},
    "With 2 and 4 samples on each device, sync lowers the test error from 61.8 and 81.8 to 6.13 and 6.13 %.": {
        2: (HIGH, LOW),
        4: (moved(HIGH, 20.0), LOW),
    },
    "With 1, 2, 4, 8 and 16 samples on each device, sync raises the test error by 20 to 60 points; "
    "with 32 it is undecided.": {
        1: (LOW, HIGH),
        **{2**at: (LOW, moved(LOW, by)) for at, by in ((1, 20.0), (2, 30.0), (3, 60.0), (4, 40.0))},
        32: (HIGH, undecided(HIGH)),
    },
    "With 1 sample on each device, it is undecided whether sync makes a difference.": {
        1: (HIGH, undecided(HIGH)),
    },
}


@pytest.mark.parametrize(("text", "by_batch"), SENTENCES.items())
def test_the_sentence_says_where_and_how_much(text: str, by_batch: dict[int, tuple[list[float], ...]]) -> None:
    made = sweep(by_batch)
    if len(by_batch) == 1:  # the only condition is not named
        made = replace(made, conditions=[*made.conditions, f"{BATCH}=2"])
    assert answer.sentence(made) == text


def test_one_condition_is_not_named() -> None:
    made = measured({("", "local", PROCESSES): HIGH, ("", "sync", PROCESSES): LOW})
    assert answer.sentence(made) == "Sync lowers the test error from 61.8 to 6.13 %."


def test_conditions_that_are_no_axis_are_named_by_what_differs() -> None:
    kinds = {"A": LOW, "B": moved(HIGH, 0.0), "C": moved(HIGH, 0.0)}
    values = {}
    for kind, sync in kinds.items():
        values[f"model={kind} data.batch_size=4", "local", ONE] = HIGH
        values[f"model={kind} data.batch_size=4", "sync", ONE] = sync
    assert answer.sentence(measured(values)) == (
        "At model=A, sync lowers the test error from 61.8 to 6.13 %; "
        "at model=B and C, it makes no difference beyond ±0.75 points."
    )
    shards = {"data.shards=null": moved(HIGH, 0.0), "data.shards=labels": LOW, "data.shards=inversion": LOW}
    values = {
        (name, side, ONE): HIGH if side == "local" else shards[name] for name in shards for side in ("local", "sync")
    }
    made = measured(values)
    assert answer.sentence(made) == (
        "With different labels and inversion, sync lowers the test error from 61.8 and 61.8 to 6.13 and 6.13 %; "
        "with the same data, it makes no difference beyond ±0.75 points."
    )
    assert [row[0] for row in symbol_matrix(made).rows] == ["the same data", "different labels", "different inversion"]


def test_sides_that_are_numbers_are_values_of_the_setting() -> None:
    sides = {"4": HIGH, "2": moved(HIGH, 0.0), "8": LOW, "16": moved(LOW, 1.0), "1": undecided(HIGH)}
    made = replace(measured({("", side, ONE): values for side, values in sides.items()}), factor="norm.group")
    assert answer.sentence(made) == (
        "norm.group 8 and 16 instead of 4 lower the test error from 61.8 to 6.13 and 7.13 %; "
        "2 makes no difference beyond ±0.75 points; 1 is undecided."
    )
    shown = symbol_matrix(made)
    assert shown.columns == ["", "test error (%)", "difference (points)"]
    assert [row[0] for row in shown.rows] == [f"norm.group={side}" for side in (1, 2, 4, 8, 16)]
    assert [cells[0].symbol for _, _, cells in shown.rows] == ["?", "=", "", "✓", "✓"]


def test_sync_is_the_main_side_wherever_it_stands() -> None:
    made = sweep({2: (HIGH, moved(HIGH, 0.0), LOW), 4: (HIGH, HIGH, LOW)}, ("local", "local_mean", "sync over world"))
    assert "sync over world lowers" in answer.sentence(made)
    assert symbol_matrix(made).columns[2:] == ["sync over world", "local_mean"]


def test_a_side_without_pairs_is_said_to_have_none() -> None:
    made = replace(comparisons.nothing_differs(), effects=frame("effects"))
    assert answer.sentence(made) == "sync could not be compared with local."
    assert (symbol_matrix(made).rows, legend(made)) == ([], [])


def test_each_verdict_has_its_symbol_without_colour() -> None:
    made = sweep({2: (HIGH, LOW), 4: (LOW, HIGH), 8: (LOW, moved(LOW, 0.0)), 16: (HIGH, undecided(HIGH))})
    assert [cell.symbol for cell in symbol_matrix(made).cells] == ["✓", "✗", "=", "?"]
    assert len({*SYMBOLS.values()}) == 4
    (first, second, third) = legend(made)
    assert first.startswith("✓ better than local, ✗ worse, = no difference beyond ±0.75 points, ? undecided.")
    assert second == "? 8 seeds show neither a difference nor its absence. More seeds would narrow the interval."
    assert third.startswith(
        "local: batch norm with the statistics of each device; sync: batch norm with statistics that"
    )


def test_a_metric_of_which_more_is_better_turns_the_symbols() -> None:
    made = sweep({2: (HIGH, LOW), 4: (LOW, HIGH)})
    made = replace(made, metric=replace(made.metric, better="higher"))
    assert [cell.symbol for cell in symbol_matrix(made).cells] == ["✗", "✓"]


def test_undecided_with_an_interval_without_zero_is_explained() -> None:
    made = sweep({2: (HIGH, LOW), 4: (HIGH, LOW)})
    effects = made.effects.assign(verdict=["undecided", "lower"], p_holm=[0.02, 0.001])
    made = replace(made, effects=effects)
    assert [cell.symbol for cell in symbol_matrix(made).cells] == ["(✓)", "✓"]
    assert answer.sentence(made).endswith("; with 2 a lower test error is likely, but not shown.")
    assert legend(made)[1] == (
        "(✓) likely, but not shown: the interval excludes 0, but 2 differences were tested. Corrected for that "
        "(Holm), p is 0.020; a difference needs less than 0.01."
    )
    worse = replace(made, metric=replace(made.metric, better="higher"))
    assert [cell.symbol for cell in symbol_matrix(worse).cells] == ["(✗)", "✗"]


def test_the_legend_explains_what_the_matrix_shows() -> None:
    """With two ways of running, the matrix shows one of them."""
    made = measured({("", side, how): of for how in (ONE, PROCESSES) for side, of in (("local", HIGH), ("sync", LOW))})
    effects = made.effects.assign(verdict=["lower", "undecided"])
    assert not [line for line in legend(replace(made, effects=effects)) if "likely" in line or "undecided" in line]


def test_numbers_have_the_decimals_of_their_interval() -> None:
    made = sweep({2: (HIGH, LOW), 4: (HIGH, undecided(HIGH))})
    effects = made.effects.assign(difference=[-55.7512, 1.2345], low=[-57.123, -5.4], high=[-54.321, 7.9])
    cells = symbol_matrix(replace(made, effects=effects)).cells
    assert [cell.text for cell in cells] == ["✓ −55.8 [−57.1, −54.3]", "? +1.2 [−5.4, +7.9]"]


def test_intervals_end_where_the_metric_does() -> None:
    near_zero = [1.0, 9.0, 0.5, 0.7, 0.6, 0.8, 8.0, 0.9]
    made = sweep({2: ([3.0, 2.5, 2.8, 3.2, 2.9, 3.1, 2.7, 2.6], near_zero), 4: (HIGH, LOW)})
    (row,) = made.effects[made.effects.condition == f"{BATCH}=2"].to_dict("records")
    base = made.means[(made.means.condition == f"{BATCH}=2") & (made.means.side == "local")]["mean"].iloc[0]
    assert base + row["low"] < 0  # the interval by itself would have a negative error
    low = float(re.findall(r"\[(.*?),", symbol_matrix(made).cells[0].interval)[0].replace("−", "-"))
    assert base + low == pytest.approx(0, abs=0.06)
    assert "cut where the test error would leave 0 to 100 %" in legend(made)[0]
    endless = replace(made, metric=replace(made.metric, least=-inf, greatest=inf))
    assert "cut where" not in legend(endless)[0]


def test_a_pair_alone_has_no_interval() -> None:
    made = sweep({2: (HIGH[:1], LOW[:1]), 4: (HIGH, LOW)})
    assert symbol_matrix(made).cells[0].text == "? −54"
    assert legend(made)[-2].startswith("? without an interval: one pair of runs has none.")


def test_the_cost_is_one_line() -> None:
    made = comparisons.rich()
    assert answer.cost(made) == (
        "Time per step relative to local (2 processes on the CPU, with 4 samples on each device; 3 pairs of runs for "
        "each, in brackets the least and the greatest): sync 2.13× (1.94 to 2.41)."
    )
    assert answer.brief_cost(made) == "A step takes 2.13× (1.94 to 2.41) as long as with local."
    cost = [
        (f"{BATCH}={batch}", side, PROCESSES, 2, 0.01, 100.0, 2, ratio, ratio - 0.1, ratio + 0.1, NAN)
        for batch, by_side in {2: (1.0, 1.5, 0.9), 4: (1.0, 1.2, 0.8)}.items()
        for side, ratio in zip(("local", "sync", "group_norm"), by_side, strict=True)
    ]
    said = answer.cost(replace(made, cost=frame("cost", cost)))
    assert said.endswith(
        "(2 processes on the CPU, the range over conditions; 2 pairs of runs for each): "
        "sync 1.20 to 1.50×, group_norm 0.80 to 0.90×."
    )
    assert answer.brief_cost(replace(made, cost=frame("cost"))) == ""
    two_ways = [(*row[:2], how, *row[3:]) for how in (PROCESSES, "2 GPUs") for row in cost[:2]]
    assert answer.cost(replace(made, cost=frame("cost", two_ways))) == (
        f"Time per step relative to local ({PROCESSES} and 2 GPUs, the range over ways of running; 2 pairs of runs for "
        "each): sync 1.50×."
    )
    without = answer.cost(replace(made, cost=frame("cost")))
    assert without == "Time per step: not measured, because no paired runs had a process for each device."
