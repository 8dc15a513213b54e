"""Tests the list of runs of a study."""

from pathlib import Path
from typing import Any

import pytest

from syncbn.study import cells as plan
from tests.support.refuses import refuses

ROOT = Path("studies/x")


def study(**more: Any) -> dict[str, Any]:
    part = {
        "settings": ["a=part"],
        "conditions": {2: ["b=2"], 4: ["b=4"]},
        "sides": {"local": ["norm=local"], "sync": ["norm=sync"]},
        "confirm": {"seeds": 1, "conditions": [4]},
        "budgets": {"smoke": {"conditions": [4], "settings": ["epochs=1"]}},
    }
    budgets = {"smoke": {"seeds": 1}, "default": {"seeds": 3}, "full": {"seeds": 9}}
    base = {"budget": "default", "seeds": None, "settings": ["simulate=2", "a=study"], "budgets": budgets}
    return base | {"parts": {"one": part}} | more


def test_every_condition_side_and_seed() -> None:
    cells = plan.cells(study(), [], ROOT)
    alone = [cell for cell in cells if plan.simulates(cell)]
    assert len(alone) == 2 * 2 * 3
    assert len({cell.directory for cell in cells}) == len(cells)
    first = alone[0]
    assert first.overrides == ["simulate=2", "a=part", "b=2", "norm=local", "seed=0"]
    assert first.directory == ROOT / "one/2/local/0"
    assert [cell.seed for cell in alone] == [0] * 4 + [1] * 4 + [2] * 4


def test_some_run_once_more_as_processes_and_last() -> None:
    cells = plan.cells(study(), [], ROOT)
    again = cells[-2:]
    assert [(cell.condition, cell.side, cell.seed) for cell in again] == [("4", "local", 0), ("4", "sync", 0)]
    assert again[0].overrides == ["trainer.devices=2", "a=part", "b=4", "norm=local", "seed=0"]
    assert again[0].directory == ROOT / "one/4/local/0-processes"
    assert all(plan.simulates(cell) for cell in cells[:-2])


def test_a_budget_chooses() -> None:
    cells = plan.cells(study(budget="smoke"), [], ROOT)
    assert {(cell.condition, cell.side) for cell in cells} == {("4", "local"), ("4", "sync")}
    assert all("epochs=1" in cell.overrides for cell in cells)
    assert {cell.seed for cell in plan.cells(study(seeds=5), [], ROOT)} == set(range(5))


def test_the_users_settings_win_over_the_studys_but_not_over_what_is_compared() -> None:
    cell = plan.cells(study(), ["a=user", "b=user", "+new=1"], ROOT)[0]
    assert cell.overrides == ["simulate=2", "a=user", "+new=1", "b=2", "norm=local", "seed=0"]


NONSENSE = [("budget", "tiny", "use one of smoke, default, full"), ("seeds", 0, "use a number, 1 or more")]


@pytest.mark.parametrize(("name", "value", "words"), NONSENSE)
def test_nonsense(name: str, value: Any, words: str) -> None:
    with refuses(f"study.{name}", value, words):
        plan.cells(study(**{name: value}), [], ROOT)
