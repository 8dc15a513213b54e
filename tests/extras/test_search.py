"""A search by Optuna: the table of its trials, failed ones, and the same search again."""

import csv
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from syncbn.training.search import sweeper
from tests.support.refuses import refuses
from tests.training.support.train_command import Run, train

# Seed 0 draws 0.1, -1, -1, 0.1 of these.
SEARCH = (
    *("-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=4", "hydra.sweep.dir=multirun/a", "objective=val/loss"),
    *("optimizer.lr=choice(0.01,0.1,-1)", "model=mlp", "debug=fast", "logger=csv", "trainer.devices=1", "test=false"),
)


def rows(where: Path) -> list[dict[str, str]]:
    with (where / "multirun/a/sweep.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check(where: Path, run: Run) -> None:
    good, bad = rows(where)
    assert (good["job"], good["optimizer.lr"], good["status"], good["best"]) == ("0", "0.1", "finished", "best")
    assert (bad["job"], bad["optimizer.lr"], bad["status"], bad["value"]) == ("1", "-1", "failed", "")
    assert bad["error"] == "optimizer.lr=-1: use a number, 0 or more"
    found = yaml.safe_load((where / "multirun/a/optimization_results.yaml").read_text(encoding="utf-8"))
    assert found["best_params"] == {"optimizer.lr": 0.1}
    assert found["best_value"] == float(good["value"])
    assert run.out.splitlines()[-1] == f"best: job 0, val/loss={float(good['value']):.4g}: multirun/a/0"
    assert run.out.count("error  ") == 1  # one table, at the end
    assert set(run.err.splitlines()) == {"error: optimizer.lr=-1: use a number, 0 or more"}


def test_failed_trials_are_shown_and_the_same_command_repeats_no_finished_one(tmp_path: Path) -> None:
    first = train(tmp_path, *SEARCH).ended()
    check(tmp_path, first)
    assert "job 1 (trial 3 of 4): optimizer.lr=-1" in first.out
    assert first.out.count("epoch 1/1") == 1
    again = train(tmp_path, *SEARCH).ended()
    check(tmp_path, again)
    assert "epoch 1/1" not in again.out
    assert again.out.count("run a-0 has finished before") == 2


def test_a_search_whose_trials_all_fail_ends_with_the_table_and_one_line(tmp_path: Path) -> None:
    command = ("-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=multirun/a", "model=mlp")
    for more in ((), ("hydra.sweeper.storage=sqlite:///trials.db", "hydra.sweeper.study_name=a")):
        run = train(tmp_path, *command, "optimizer.lr=choice(-1,-2)", *more).ended(1)
        *errors, last = run.err.splitlines()
        assert last.startswith(
            "error: no trial has a value of the objective; the same sweep with hydra.sweep.dir=multirun/a"
        )
        assert len(errors) == 2
        assert {row["status"] for row in rows(tmp_path)} == {"failed"}


@pytest.mark.parametrize("storage", ["trials", "sqlite:////no/such/directory/trials.db"])
def test_a_database_that_cannot_be_used_is_refused(storage: str) -> None:
    settings = {"_target_": f"{sweeper.PLUGIN}.X", "direction": "maximize", "n_trials": 1, "n_jobs": 1}
    config = OmegaConf.create({"hydra": {"sweeper": settings | {"storage": storage}}, "objective": "val/acc"})
    with refuses("hydra.sweeper.storage", storage, "sqlite:///search.db"):
        sweeper.check(config)
