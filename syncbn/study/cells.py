"""``cells``: lists the runs of a study from its settings in ``conf/study``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.training.errors import SettingError

BUDGETS = ("smoke", "default", "full")


class Cell(NamedTuple):
    """One run of a study, with its command-line overrides for ``train.py`` and its run directory."""

    part: str
    condition: str
    side: str
    seed: int
    overrides: list[str]
    directory: Path


def cells(study: Mapping[str, Any], overrides: Sequence[str], root: Path) -> list[Cell]:
    """Lists every run of a study.

    Runs are sorted by seed, so that an interrupted study has complete pairs. Runs as processes are last.

    Args:
        study: the settings under ``study`` as plain containers. Each of ``parts`` has ``conditions`` and ``sides``
            (names with their overrides). It can have ``settings`` for all its runs, ``confirm``, which selects runs to
            repeat as processes, and ``without``, a list of selections of runs to leave out. An entry of ``budgets``, of
            the study or of the part, has the number of ``seeds``. It can restrict ``conditions`` and ``sides``, and add
            ``settings``.
        overrides: of the user. They replace settings of the study and the part; conditions and sides replace them.
        root: the study's directory.

    Raises:
        SettingError: the budget does not exist, or the number of seeds is below 1.
    """
    if study["budget"] not in BUDGETS:
        raise SettingError("study.budget", study["budget"], f"use one of {', '.join(BUDGETS)}")
    if study["seeds"] is not None and study["seeds"] < 1:
        raise SettingError("study.seeds", study["seeds"], "use a number, 1 or more, or null for the budget's")
    found = [
        cell
        for name, part in study["parts"].items()
        for cell in _cells_of_part(study, str(name), part, overrides, root)
    ]
    return sorted(found, key=order)


def order(cell: Cell) -> tuple[bool, int]:
    """The sort key of runs: one-process runs first, then by seed."""
    return not simulates(cell), cell.seed


def simulates(cell: Cell) -> bool:
    """Whether the run simulates its devices in one process."""
    return any(each.startswith("simulate=") for each in cell.overrides)


def budget(study: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the chosen budget for a part."""
    chosen = study["budget"]
    return {**study.get("budgets", {}).get(chosen, {}), **part.get("budgets", {}).get(chosen, {})}


def seeds(study: Mapping[str, Any], part: Mapping[str, Any]) -> int:
    """The number of seeds of a part."""
    return int(study["seeds"] or budget(study, part)["seeds"])


def _cells_of_part(
    study: Mapping[str, Any], name: str, part: Mapping[str, Any], overrides: Sequence[str], root: Path
) -> Iterable[Cell]:
    says = budget(study, part)
    common = [*study.get("settings", []), *part.get("settings", []), *says.get("settings", []), *overrides]
    confirm = {**part.get("confirm", {}), **says.get("confirm", {})}
    conditions, sides = (_selected(part, says, kind) for kind in ("conditions", "sides"))
    for condition, of_condition in conditions.items():
        for side, of_side in sides.items():
            if any(is_chosen(condition, side, each) for each in part.get("without", [])):
                continue
            for seed in range(seeds(study, part)):
                settings = merged(common, of_condition, of_side, [f"seed={seed}"])
                where = root / name / condition / side
                yield Cell(name, condition, side, seed, settings, where / str(seed))
                if seed < confirm.get("seeds", 0) and is_chosen(condition, side, confirm):
                    yield Cell(name, condition, side, seed, as_processes(settings), where / f"{seed}-processes")


def is_chosen(condition: str, side: str, chosen: Mapping[str, Any]) -> bool:
    """Whether ``chosen`` has the condition and the side, as far as it restricts ``conditions`` and ``sides``."""
    names = {"conditions": condition, "sides": side}
    return all(name in map(str, chosen.get(kind, [name])) for kind, name in names.items())


def _selected(part: Mapping[str, Any], says: Mapping[str, Any], kind: str) -> dict[str, list[str]]:
    there = {str(name): list(settings or []) for name, settings in part.get(kind, {"": []}).items()}
    return {str(name): there[str(name)] for name in says.get(kind, there)}


def as_processes(settings: Sequence[str]) -> list[str]:
    """The overrides of the same run with one process for each simulated device."""
    return [re.sub("^simulate=", "trainer.devices=", each) for each in settings]


def merged(*lists: Iterable[str]) -> list[str]:
    """Joins lists of overrides. A later override replaces an earlier one with the same name."""
    found: dict[str, str] = {}
    for each in (each for part in lists for each in part):
        name = each.split("=", 1)[0].lstrip("+~").split("@")[0]
        found.pop(name, None)
        found[name] = each
    return list(found.values())
