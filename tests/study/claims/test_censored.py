"""Tests censored numbers: their reduction over conditions, and the answers that bounds forbid."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from syncbn.study.claims.readings import Number, minus, of_effect, over
from syncbn.study.claims.result import Row
from syncbn.study.claims.rule import Reading
from tests.study.support.claim_study import found, study, sync_row, write

STEPS = {"metric": "target/steps", "effect": "ratio", "at_least": 1.25, "what": "steps"}
HIGHEST = {"metric": "test/acc", "over": "highest", "usable": 10, "wants": "higher", "effect": "ratio", "at_least": 2}
Seen = Sequence[tuple[float, float]]  # steps, and whether the target was reached; by seed

FAST: Seen = [(100 + seed, 1) for seed in range(8)]
SLOW: Seen = [(400 + 3 * seed, 1) for seed in range(8)]
LATE: Seen = [(400 + 3 * seed, seed > 0) for seed in range(8)]
EARLY: Seen = [(100 + seed, seed > 0) for seed in range(8)]  # the first run diverged after 100 steps


def steps(root: Path, condition: str = "0.1", **by_side: Seen) -> Path:
    for side, seen in by_side.items():
        for seed, (count, reached) in enumerate(seen):
            target = {"target/steps": count, "target/reached": int(reached)}
            write(root / "one" / condition / side / str(seed), target=target, diverged=int(not reached))
    return root


@pytest.mark.parametrize(
    ("none", "sync", "says", "open_p", "note"),
    [
        (SLOW, FAST, "yes", "", ""),
        (LATE, FAST, "yes", "p_no", "so the answer cannot be no"),
        (SLOW, EARLY, "open", "p_yes", "so the answer cannot be yes"),
        (FAST, SLOW, "no", "", ""),
        (EARLY, SLOW, "open", "p_no", "so the answer cannot be no"),
        (FAST, LATE, "no", "p_yes", "so the answer cannot be yes"),
        (LATE, EARLY, "open", "p_yes p_no", "so the answer can be neither yes nor no"),
    ],
)
def test_a_bound_forbids_what_it_could_change(
    tmp_path: Path, none: Seen, sync: Seen, says: str, open_p: str, note: str
) -> None:
    one = sync_row(steps(tmp_path, none=none, sync=sync), STEPS)
    assert (one.n, one.says) == (8, says)
    assert [name for name in ("p_yes", "p_no") if math.isnan(getattr(one, name))] == open_p.split()
    assert one.what == "steps"
    assert one.note.endswith(note)
    assert ("cannot be" in one.note or "neither" in one.note) == bool(note)


@pytest.mark.parametrize(
    ("local", "sync", "word", "note"),
    [
        (SLOW, FAST, "better", ""),
        (LATE, FAST, "better", "so neither worse nor no difference can be shown"),
        (SLOW, EARLY, "not decided", "so neither better nor no difference can be shown"),
        (FAST, LATE, "worse", "so neither better nor no difference can be shown"),
        (EARLY, SLOW, "not decided", "so neither worse nor no difference can be shown"),
        (EARLY, EARLY, "not decided", "so neither a difference nor its absence can be shown"),
        (FAST, FAST, "no difference", ""),
        (EARLY, FAST, "not decided", "so neither worse nor no difference can be shown"),
    ],
)
def test_a_bound_forbids_what_it_could_change_of_sharing(
    tmp_path: Path, local: Seen, sync: Seen, word: str, note: str
) -> None:
    (one,) = found(steps(tmp_path, local=local, sync=sync), study({"plain": STEPS})).versus
    assert one.word == word
    assert one.note.endswith(note)
    assert (one.note != "") == bool(note)


def test_the_best_is_of_those_that_got_there(tmp_path: Path) -> None:
    """A run that diverged after 30 steps is not the fastest. If no run reached the target, the longest is a bound."""
    for condition, none, sync in (("0.1", 30, 30), ("1", 300, 200)):
        steps(tmp_path, condition, none=[(none, none == 300)] * 2, sync=[(sync, 0), (sync, sync == 200)])
    one = sync_row(tmp_path, STEPS | {"over": "best", "conditions": ["0.1", "1"]}, seeds=2)
    assert (one.value, one.other) == (200.0, 300.0)
    assert one.note == (
        "sync: 3 of 4 runs missed the target; the best run that reached it counts, and for 1 of 2 seeds without one "
        "the most steps trained; none: 2 of 4 runs missed the target; the best run that reached it counts; "
        "so the answer cannot be yes"
    )
    assert math.isnan(one.p_yes)
    assert not math.isnan(one.p_no)


def ladder(root: Path, diverged: str = "", **errors: Sequence[float]) -> Row:
    """Errors in percent of 8 seeds at the three conditions."""
    for side, by_condition in errors.items():
        for condition, error in zip(("0.1", "1", "10"), by_condition, strict=True):
            for seed in range(8):
                stopped = int(diverged == condition)
                write(root / "one" / condition / side / str(seed), test={"test/acc": 1 - error / 100}, diverged=stopped)
    return sync_row(root, HIGHEST)


@pytest.mark.parametrize(
    ("none", "sync", "numbers", "says", "nan"),
    [
        ([5, 50, 50], [5, 5, 50], (1.0, 0.1), "yes", ""),
        ([5, 50, 50], [5, 5, 5], (10.0, 0.1), "yes", "p_no"),
        ([50, 50, 50], [5, 5, 50], (1.0, 0.1), "yes", "p_no"),  # none: below 0.1, if any
        ([5, 5, 50], [50, 50, 50], (0.1, 1.0), "no", "p_yes"),
        ([5, 5, 5], [5, 5, 50], (1.0, 10.0), "no", "p_yes"),
        ([5, 5, 5], [5, 5, 5], (10.0, 10.0), "open", "p_yes p_no"),
        ([50, 50, 50], [50, 50, 50], (0.1, 0.1), "open", "p_yes p_no"),
    ],
)
def test_the_ends_of_a_ladder_are_bounds(
    tmp_path: Path, none: list[float], sync: list[float], numbers: tuple[float, float], says: str, nan: str
) -> None:
    one = ladder(tmp_path, none=none, sync=sync)
    assert (one.value, one.other, one.says) == (*numbers, says)
    assert [name for name in ("p_yes", "p_no") if math.isnan(getattr(one, name))] == nan.split()


def test_what_diverged_is_not_usable_however_good_it_is(tmp_path: Path) -> None:
    one = ladder(tmp_path, diverged="10", none=[5, 50, 50], sync=[5, 5, 5])
    assert (one.value, one.other) == (1.0, 0.1)
    assert not math.isnan(one.p_no)


@pytest.mark.parametrize(
    ("how", "wants", "numbers", "made"),
    [
        ("best", "lower", [Number(3, True), Number(5)], Number(5)),
        ("best", "lower", [Number(3, True), Number(5, True)], Number(5, True)),
        ("best", "lower", [Number(math.inf), Number(5)], Number(5)),
        ("worst", "lower", [Number(3, True), Number(5)], Number(5, True)),
        ("mean", "lower", [Number(3, True), Number(5)], Number(4, True)),
        ("mean", "lower", [Number(3), Number(5)], Number(4)),
        ("best", "higher", [Number(3), Number(5, True)], Number(5, True)),
        ("a", "lower", [Number(3, True)], Number(3, True)),
    ],
)
def test_conditions_that_are_bounds(how: str, wants: str, numbers: list[Number], made: Number) -> None:
    reading = Reading(part="one", metric="target/steps", over=how, conditions=("a", "b"), wants=wants)
    assert over(reading, numbers) == made


def test_what_is_left_of_bounds() -> None:
    assert minus(Number(5, is_least=True), Number(3)) == Number(2, is_least=True)
    assert minus(Number(5), Number(3, is_least=True)) == Number(2, is_most=True)
    assert minus(Number(5), Number(3, is_most=True)) == Number(2, is_least=True)
    least: dict[str, Any] = {"side": Number(5, is_least=True), "other": Number(3)}
    assert (of_effect("lower", **least), of_effect("higher", **least)) == ((False, True), (True, False))
