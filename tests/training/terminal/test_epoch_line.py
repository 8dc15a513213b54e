"""The words of an epoch's line: positions, metrics without their twins, and the time that is left."""

import math
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Timer

from syncbn.training.callbacks.progress import Throughput
from syncbn.training.terminal import epoch_line, metric_rows
from syncbn.training.terminal.epoch_line import Pace


def test_of_a_metric_and_its_twins_only_the_metric_is_shown() -> None:
    logged = [
        "train/loss",
        "train/loss_step",
        "train/loss_epoch",
        "val/acc",
        "lr-SGD",
        "lr-SGD/pg1",
        "a_step",
        "b_epoch",
    ]
    assert epoch_line.once(dict.fromkeys(logged, 1.0)) == ["a_step", "b_epoch", "train/loss", "val/acc"]
    assert epoch_line.once({"loss_step": 1.0, "loss_epoch": 2.0}) == ["loss_step"]  # in Lightning's progress bar


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.74567, "0.7457"), (0.0, "0.0000"), (1e-5, "1e-05"), (-12345.6, "-1.235e+04"), (9999.0, "9999.0000"),
     (math.nan, "nan"), (math.inf, "inf")],
)  # fmt: skip
def test_numbers_keep_four_digits(value: float, text: str) -> None:
    assert metric_rows.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (42, "0:42"), (59.6, "1:00"), (723, "12:03"), (3600, "1:00:00"), (183_723, "51:02:03")],
)
def test_durations(seconds: float, text: str) -> None:
    assert epoch_line.duration(seconds) == text


def test_names_of_a_stage_are_grouped() -> None:
    words = ["loss 3", "train/acc 1", "train/loss 2", "val/acc 3", "val/acc/top5 4", "z 5"]
    assert epoch_line.grouped(words) == ["loss 3", "train acc 1", "loss 2", "val acc 3", "acc/top5 4", "z 5"]


@pytest.mark.parametrize("width", [10, 40, 80, 120])
def test_long_lists_are_broken_between_metrics_and_aligned(width: int) -> None:
    words = [f"metric{number} 0.{number:04}" for number in range(12)]
    lines = epoch_line.hanging("epoch 1/3", words, width)
    assert " ".join(lines).split() == ["epoch", "1/3", *" ".join(words).split()]
    longest = max(len("epoch 1/3  ") + len(word) for word in words)
    assert all(len(line) <= max(width, longest) for line in lines)
    assert all(line.startswith(" " * len("epoch 1/3  ")) for line in lines[1:])


def trainer(**more: Any) -> Any:
    made = {"max_epochs": 4, "max_steps": -1, "current_epoch": 0, "global_step": 0, "num_training_batches": 10}
    made |= {"should_stop": False, "callbacks": [], "fit_loop": SimpleNamespace(batch_idx=0)}
    return SimpleNamespace(**made | more)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(epoch_line.time, "monotonic", lambda: now[0])
    return now


def batches(pace: Pace, at: Any, clock: list[float], number: int) -> None:
    for _ in range(number):
        clock[0] += 2.0  # seconds per batch
        at.global_step += 1
        pace.batch(at)
        at.fit_loop.batch_idx += 1
    at.fit_loop.batch_idx -= 1


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        ({}, 2.0 * (40 - 5)),
        ({"max_steps": 12}, 2.0 * (12 - 5)),
        ({"max_epochs": -1, "max_steps": 12}, 2.0 * (12 - 5)),
        ({"max_epochs": -1}, None),
        ({"num_training_batches": math.inf}, None),
        ({"num_training_batches": math.inf, "max_steps": 12}, 2.0 * (12 - 5)),
        ({"current_epoch": 3}, 2.0 * (10 - 5)),
        ({"should_stop": True}, 0.0),
    ],
)
def test_the_time_left(clock: list[float], more: dict[str, Any], seconds: float | None) -> None:
    pace, at = Pace(), trainer(**more)
    batches(pace, at, clock, 5)
    assert pace.seconds_left(at) == (seconds if seconds is None else pytest.approx(seconds))


def test_an_epoch_of_unknown_length_is_as_long_as_the_one_before(clock: list[float]) -> None:
    pace, at = Pace(), trainer(num_training_batches=math.inf)
    batches(pace, at, clock, 10)
    pace.epoch(at)
    assert pace.seconds_left(at) == pytest.approx(2.0 * 30)


def test_a_limit_of_time_ends_it_before(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(timedelta(seconds=9))
    monkeypatch.setattr(timer, "time_remaining", lambda: 7.5)
    pace, at = Pace(), trainer(callbacks=[timer])
    batches(pace, at, clock, 5)
    assert pace.seconds_left(at) == 7.5


def test_before_the_second_batch_nothing_is_known(clock: list[float]) -> None:
    pace, at = Pace(), trainer(callbacks=[Throughput()])
    assert epoch_line.pace_words(at, pace) == []
    batches(pace, at, clock, 1)
    assert epoch_line.pace_words(at, pace) == []


def test_images_per_second_are_those_of_the_epoch() -> None:
    measured = Throughput()
    pace, at = Pace(), trainer(callbacks=[measured])
    measured.samples, measured.seconds = 100, 10.0
    assert pace.images_per_second(at) == 10.0
    pace.epoch(at)
    measured.samples, measured.seconds = 400, 11.0
    assert pace.images_per_second(at) == 300.0


@pytest.mark.parametrize(("last", "name"), [(15, "epoch  3/15"), (3, "epoch 3/3"), (-1, "epoch 3"), (None, "epoch 3")])
def test_epochs_count_from_1(last: int | None, name: str) -> None:
    assert epoch_line.epoch_name(trainer(max_epochs=last, current_epoch=2)) == name
