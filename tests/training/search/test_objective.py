"""The value that a sweeper optimizes: of training, of a test alone, or by the name of a metric; and what is better."""

import math
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from syncbn.training.run_directory import record
from syncbn.training.search import objective, sweeper
from tests.support.refuses import ANY, refuses

CSV = "step,epoch,val/acc,val/loss,train/loss\n1,0,0.5,2.0,\n1,0,,,3.0\n2,1,0.75,1.5,\n3,2,0.625,1.0,\n3,2,,,0.5\n"
CONFIG = """
data: {}
norm: {}
trainer: {}
callbacks: {checkpoint: {monitor: val/acc, mode: max}}
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "metrics.csv").write_text(CSV, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    record.write(tmp_path, "result", {"monitored": {"val/acc": 0.75}, "test": {"test/acc": 0.7}, "seconds": 3.5})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((None, 0.75), ("val/acc", 0.75), ("test/acc", 0.7), ("seconds", 3.5)),
        ("val/loss", 1.5),  # of the checkpoint that is kept, not the smallest
        ("train/loss", 0.5),  # not logged with the monitored metric: the last one
    ],
)
def test_a_metric_of_the_run(run_dir: Path, name: str | None, value: float) -> None:
    assert objective.value(run_dir, name) == value


def test_a_run_that_only_tests_has_the_test_metric_of_the_monitored_name(run_dir: Path) -> None:
    record.write(run_dir, "result", {"test": {"test/acc": 0.25, "test/loss": 2.0}})
    assert objective.value(run_dir, None) == 0.25
    record.write(run_dir, "result", {"test": {"test/f1": 0.25}})
    assert objective.value(run_dir, None) is None


def test_a_metric_that_the_run_does_not_have_is_refused_with_the_nearest(run_dir: Path) -> None:
    with refuses("objective", "test/ac", "this run has no such metric; the nearest is test/acc"):
        objective.value(run_dir, "test/ac")


@pytest.mark.parametrize(
    ("name", "mode", "better"),
    [
        *((None, "max", "maximize"), (None, "min", "minimize"), ("val/acc", "min", "minimize")),
        *(("val/loss", "max", "minimize"), ("test/f1", "max", "maximize"), ("seconds", "max", "minimize")),
        *(("val/mine", "max", "unknown"), (None, None, "unknown")),
    ],
)
def test_what_is_better(name: str | None, mode: str | None, better: str) -> None:
    assert objective.direction(name, "val/acc", mode) == better


def test_a_value_that_is_no_number_is_a_failure() -> None:
    assert [bool(objective.missing(value)) for value in (0.5, 0, None, math.nan, math.inf)] == [False] * 2 + [True] * 3


def config(direction: Any, name: str | None = None, trials: int = 4) -> Any:
    target = f"{sweeper.PLUGIN}.optuna_sweeper.OptunaSweeper"
    sweeping = {"_target_": target, "direction": direction, "n_trials": trials, "n_jobs": 1}
    settings = {"hydra": {"sweeper": sweeping}, "objective": name}
    return OmegaConf.create(settings | {"callbacks": {"checkpoint": {"monitor": "val/acc", "mode": "max"}}})


def test_a_search_for_the_worst_is_refused() -> None:
    sweeper.check(config("maximize"))
    sweeper.check(config("minimize", "val/loss"))
    sweeper.check(config("minimize", "val/mine"))
    with refuses("hydra.sweeper.direction", "minimize", "the worst val/acc; use hydra.sweeper.direction=maximize"):
        sweeper.check(config("minimize"))
    with refuses("hydra.sweeper.direction", ANY, "does not follow from objective=val/mine; use maximize or minimize"):
        sweeper.check(config("unknown", "val/mine"))
    with refuses("hydra.sweeper.n_trials", 0, "1 or more"):
        sweeper.check(config("maximize", trials=0))
    with refuses("hydra.sweeper.direction", ANY, "a run has one objective"):
        sweeper.check(config(["maximize", "minimize"]))
