"""The studies that one call of ``+study=NAME`` does: itself, or those that it names (``study.studies``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.study import cells as plan
from syncbn.study.cells import Cell
from syncbn.study.claims.rules import rule
from syncbn.training.errors import SettingError

# What may be said of several studies at once; the two in front are handed on.
SHARED = ("budget", "seeds", "directory", "slots", "dry_run", "report_only", "studies")


class Member(NamedTuple):
    """One study.

    Attributes:
        study: the settings under ``study``, plain.
        cells: its runs.
        root: its directory.
    """

    study: dict[str, Any]
    cells: list[Cell]
    root: Path


def of(study: dict[str, Any], overrides: Sequence[str], root: Path) -> list[Member]:
    """The studies to do, in order. Each of ``study.studies`` has its directory within ``root``.

    Args:
        study: the settings under ``study``, plain.
        overrides: of the user, those for the study too.
        root: the study's directory.

    Raises:
        SettingError: settings that cannot be composed, a plan that cannot be made, a claim whose rule cannot be read.
    """
    of_runs = [each for each in overrides if _name(each) != "study" and not _name(each).startswith("study.")]
    if not study["studies"]:
        return [_member(study, of_runs, root)]
    for name in map(_name, overrides):
        if name.startswith("study.") and name.split(".")[1] not in SHARED:
            raise SettingError(
                name,
                hint=f"study={study['name']} consists of other studies; set this for one of them, +study="
                f"{study['studies'][0]}, or use one of {', '.join(f'study.{each}' for each in SHARED)}",
            )
    found = []
    for name in dict.fromkeys(map(str, study["studies"])):
        composed = _composed(name, study, of_runs)
        try:
            found.append(_member(composed, of_runs, root / name))
        except SettingError as error:
            raise SettingError("+study", name, str(error)) from error
    return found


def _member(study: dict[str, Any], overrides: Sequence[str], root: Path) -> Member:
    cells = plan.cells(study, overrides, root)
    if study["claim"] is not None:
        rule.parse(study)  # before the runs: a page that cannot be made is no surprise after them
    return Member(study, cells, root)


def _composed(name: str, above: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The settings under ``study`` of another one, with the budget and the seeds of the one above."""
    handed = [f"study.budget={above['budget']}", f"study.seeds={'null' if above['seeds'] is None else above['seeds']}"]
    try:
        cfg = hydra.compose(HydraConfig.get().job.config_name, [f"+study={name}", *overrides, *handed])
        found: dict[str, Any] = OmegaConf.to_container(cfg.study, resolve=True)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError("+study", name, " ".join(str(error).split())) from error
    if found["claim"] is None:
        raise SettingError("+study", name, "it has no claim (study.claim); use studies that have one in study.studies")
    return found


def _name(override: str) -> str:
    """``study.budget`` of ``study.budget=smoke``."""
    return override.lstrip("+~").split("=", 1)[0]
