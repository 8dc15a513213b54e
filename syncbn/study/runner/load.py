"""Loads the studies of one ``+study=NAME`` call: the named study, or the studies in its ``study.studies``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.study import cells as plan
from syncbn.study.cells import Cell
from syncbn.study.claims import expectations, rule
from syncbn.training.errors import SettingError

# Settings that are valid for a study of studies. The first two are passed on to each of them.
SHARED = ("budget", "seeds", "directory", "slots", "dry_run", "report_only", "studies")


class Member(NamedTuple):
    """One study of a call: its settings under ``study`` as plain containers, its runs, and its directory."""

    study: dict[str, Any]
    cells: list[Cell]
    root: Path


def of(study: dict[str, Any], overrides: Sequence[str], root: Path) -> list[Member]:
    """Loads the studies, in order. Each of ``study.studies`` has its own directory in ``root``.

    The user's ``overrides`` include those of the study.

    Raises:
        SettingError: the settings cannot be composed, or the budget, the seeds or a claim's rule is invalid.
    """
    of_runs = [each for each in overrides if _override_name(each).split(".")[0] != "study"]
    if not study["studies"]:
        return [_member(study, of_runs, root)]
    for name in map(_override_name, overrides):
        if name.startswith("study.") and name.split(".")[1] not in SHARED:
            raise SettingError(
                name,
                hint=f"study={study['name']} consists of other studies; set this for one of them, +study="
                f"{study['studies'][0]}, or use one of {', '.join(f'study.{each}' for each in SHARED)}",
            )
    found = []
    for name in dict.fromkeys(map(str, study["studies"])):
        composed = _compose_study(name, study, of_runs)
        try:
            found.append(_member(composed, of_runs, root / name))
        except SettingError as error:
            raise SettingError("+study", name, str(error)) from error
    return found


def _member(study: dict[str, Any], overrides: Sequence[str], root: Path) -> Member:
    cells = plan.cells(study, overrides, root)
    expectations.parse(study)  # an invalid rule should fail before the runs, not after them
    if study["claim"] is not None:
        rule.parse(study)
    return Member(study, cells, root)


def _compose_study(name: str, above: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The settings under ``study`` of a study in ``study.studies``, with the budget and the seeds of the latter."""
    handed = [f"study.budget={above['budget']}", f"study.seeds={'null' if above['seeds'] is None else above['seeds']}"]
    with composing("+study", value=name):
        cfg = hydra.compose(HydraConfig.get().job.config_name, [f"+study={name}", *overrides, *handed])
        found: dict[str, Any] = OmegaConf.to_container(cfg.study, resolve=True)  # type: ignore[assignment]
    if found["claim"] is None:
        raise SettingError("+study", name, "it has no claim (study.claim); use studies that have one in study.studies")
    return found


@contextmanager
def composing(setting: str, **value: str) -> Iterator[None]:
    """Turns an error of Hydra or OmegaConf into a one-line error on the setting, with its value if that is given."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(setting, **value, hint=" ".join(str(error).split())) from error


def _override_name(override: str) -> str:
    """The name in an override: ``study.budget`` for ``study.budget=smoke``."""
    return override.lstrip("+~").split("=", 1)[0]
