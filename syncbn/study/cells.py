"""The runs that a study is made of, from its file in ``conf/study``."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.training.errors import SettingError

BUDGETS = ("smoke", "default", "full")


class Cell(NamedTuple):
    """One run of a study.

    Attributes:
        part: of the study.
        condition: of the part.
        side: of the comparison.
        seed: of the run.
        overrides: for ``train.py``.
        directory: the run directory.
    """

    part: str
    condition: str
    side: str
    seed: int
    overrides: list[str]
    directory: Path


def cells(study: Mapping[str, Any], overrides: Sequence[str], root: Path) -> list[Cell]:
    """Every run, those of the first seed first, so that a study that is stopped has whole pairs; processes last.

    Args:
        study: the settings under ``study``, plain. Each of ``parts`` has ``conditions`` and ``sides`` (a name and its
            overrides, each), perhaps ``settings`` for all, and ``confirm``: which of them run once more as processes.
            A budget's entry in ``budgets``, of the study or of the part, says how many ``seeds``, and perhaps which
            ``conditions`` and ``sides`` alone, and ``settings``.
        overrides: of the user, which go before the study's settings and after those of conditions and sides.
        root: the study's directory.

    Raises:
        SettingError: a budget that is none, or a number of seeds below 1.
    """
    if study["budget"] not in BUDGETS:
        raise SettingError("study.budget", study["budget"], f"use one of {', '.join(BUDGETS)}")
    if study["seeds"] is not None and study["seeds"] < 1:
        raise SettingError("study.seeds", study["seeds"], "use a number, 1 or more, or null for the budget's")
    found = [
        cell for name, part in study["parts"].items() for cell in _of_part(study, str(name), part, overrides, root)
    ]
    return sorted(found, key=order)


def order(cell: Cell) -> tuple[bool, int]:
    """What runs are sorted by; two single ones fill a machine of two."""
    return not simulates(cell), cell.seed


def simulates(cell: Cell) -> bool:
    """Whether one process does it."""
    return any(each.startswith("simulate=") for each in cell.overrides)


def budget(study: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """What the chosen budget says of a part."""
    chosen = study["budget"]
    return {**study.get("budgets", {}).get(chosen, {}), **part.get("budgets", {}).get(chosen, {})}


def seeds(study: Mapping[str, Any], part: Mapping[str, Any]) -> int:
    """How many seeds a part has."""
    return int(study["seeds"] or budget(study, part)["seeds"])


def _of_part(
    study: Mapping[str, Any], name: str, part: Mapping[str, Any], overrides: Sequence[str], root: Path
) -> Iterable[Cell]:
    says = budget(study, part)
    common = [*study.get("settings", []), *part.get("settings", []), *says.get("settings", []), *overrides]
    conditions, sides = (_chosen(part, says, kind) for kind in ("conditions", "sides"))
    for condition, of_condition in conditions.items():
        for side, of_side in sides.items():
            for seed in range(seeds(study, part)):
                settings = merged(common, of_condition, of_side, [f"seed={seed}"])
                where = root / name / condition / side
                yield Cell(name, condition, side, seed, settings, where / str(seed))
                if _is_confirmed(part, says, condition, side, seed):
                    yield Cell(name, condition, side, seed, as_processes(settings), where / f"{seed}-processes")


def _is_confirmed(part: Mapping[str, Any], says: Mapping[str, Any], condition: str, side: str, seed: int) -> bool:
    confirm = {**part.get("confirm", {}), **says.get("confirm", {})}
    if seed >= confirm.get("seeds", 0):
        return False
    names = {"conditions": condition, "sides": side}
    return all(name in map(str, confirm.get(kind, [name])) for kind, name in names.items())


def _chosen(part: Mapping[str, Any], says: Mapping[str, Any], kind: str) -> dict[str, list[str]]:
    there = {str(name): list(settings or []) for name, settings in part.get(kind, {"": []}).items()}
    return {str(name): there[str(name)] for name in says.get(kind, there)}


def as_processes(settings: Sequence[str]) -> list[str]:
    """The same run with a process for each device that ``simulate`` has in one."""
    return [
        each.replace("simulate=", "trainer.devices=") if each.startswith("simulate=") else each for each in settings
    ]


def merged(*lists: Iterable[str]) -> list[str]:
    """Overrides, of which a later one takes the place of an earlier one of the same name."""
    found: dict[str, str] = {}
    for each in (each for part in lists for each in part):
        name = each.split("=", 1)[0].lstrip("+~").split("@")[0]
        found.pop(name, None)
        found[name] = each
    return list(found.values())
