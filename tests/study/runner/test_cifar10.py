"""The study on CIFAR-10: its steps at each budget, and the smoke budget on a tiny archive, as a user calls it."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from syncbn.study.cells import Cell, cells, simulates
from syncbn.study.claims import expectations
from tests.training.data.test_image_archives import cifar10
from tests.training.support.settled_config import composed
from tests.training.support.train_command import train

STEP = {"fixed_step": 32, "normalization_batch": 64}
AVAILABLE = {"train": 50_000 - 500, "test": 10_000}


# What the smoke budget runs with two processes as well.
TWICE = ["fixed_step/2/local", "fixed_step/2/sync", "normalization_batch/32"]


def of_budget(budget: str) -> dict[str, Any]:
    study: dict[str, Any] = OmegaConf.to_container(composed("+study=cifar10", f"study.budget={budget}").study)  # type: ignore[assignment]
    return study


def loss(run: Path) -> float:
    found: float = json.loads((run / "result.json").read_text(encoding="utf-8"))["test"]["test/loss"]
    return found


def different(found: list[Cell]) -> list[tuple[str, Any]]:
    """The settings of a run of each part and condition; sides differ in the norm only."""
    first = {(each.part, each.condition): each.overrides for each in reversed(found) if each.side != "group_norm"}
    return [(part, composed(*overrides)) for (part, _), overrides in first.items()]


@pytest.mark.parametrize("budget", ["smoke", "default", "full"])
def test_all_runs_of_a_part_have_the_same_step_and_the_same_images(budget: str, tmp_path: Path) -> None:
    for part, cfg in different(cells(of_budget(budget), [], tmp_path)):
        devices, batches = cfg.simulate or cfg.trainer.devices, cfg.trainer.accumulate_grad_batches
        assert devices == 2
        assert devices * cfg.data.batch_size * batches == STEP[part]
        assert cfg.data.train_images % STEP[part] == 0  # no sample is left out, and no smaller step ends an epoch
        assert cfg.data.train_images <= AVAILABLE["train"]
        assert cfg.precise_batches % batches == 0
        assert cfg.trainer.max_epochs % cfg.trainer.check_val_every_n_epoch == 0


def test_the_default_budget_is_what_two_cores_do_in_twenty_minutes(tmp_path: Path) -> None:
    """The time of a run was measured; the number of runs is what a change of the file would change unseen."""
    found = cells(of_budget("default"), [], tmp_path)
    simulated = sum(simulates(each) for each in found)
    assert (simulated, len(found) - simulated) == (120, 3)
    assert {each.seed for each in found} == set(range(8))


def test_norms_without_batch_statistics_are_run_once_for_all_batches(tmp_path: Path) -> None:
    found = cells(of_budget("full"), [], tmp_path)
    where = {side: {each.condition for each in found if each.side == side} for side in ("sync", "group_norm", "none")}
    assert where == {"sync": {"2", "4", "8", "16"}, "group_norm": {"2"}, "none": {"2"}}


def test_a_whole_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smoke budget on random images: the simulated devices do what processes do, and the page answers the rules."""
    cifar10(tmp_path, classes=10, images=50)
    monkeypatch.setenv("CIFAR10", str(tmp_path))
    run = train(tmp_path, "+study=cifar10", "study.budget=smoke", "study.directory=s", "logger=csv")
    assert run.code == 0, run.err
    assert not run.left
    page = html.unescape((tmp_path / "s" / "report" / "report.html").read_text(encoding="utf-8"))
    assert all(each.text in page for each in expectations.parse(of_budget("smoke")).values())
    twice = sorted((tmp_path / "s").rglob("0-processes"))
    assert [str(each.parent.relative_to(tmp_path / "s")) for each in twice] == TWICE
    for processes in twice:
        assert loss(processes) == pytest.approx(loss(processes.with_name("0")), rel=1e-4)
