"""What run directories say. Nothing is left out: a run that failed or is damaged is read as far as it can be."""

import csv
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from syncbn.training.config.schema import GROUPS
from syncbn.training.errors import SettingError
from syncbn.training.os_errors import explain
from syncbn.training.read_file import out_of_range, read_bytes, read_text
from syncbn.training.run_directory import lock
from syncbn.training.run_directory.kinds import lacks

GRADIENT_COLUMNS = ("step", "layer", "depth", "norm")
LAYER_COLUMNS = ("step", "layer", "device_batch", "group_batch", "spread", "effective_batch", "variance_ratio")
DAMAGED = "cannot be read: it is damaged"
# libyaml's is ten times as fast, where PyYAML was built with it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: it.
        status: "finished", "failed", "interrupted", "requeued", "running", "killed" (its record says "running",
            and no process is at it), or "no result": it has finished, or nobody knows how it ended, and what came out
            cannot be read.
        trouble: what is wrong with it, for people; "" where it has finished and its files are whole.
        config: ``config.yaml``, empty where it cannot be read.
        about: ``run.json``, likewise.
        result: ``result.json``, likewise.
    """

    path: Path
    status: str
    trouble: str
    config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """The seed; None where the settings cannot be read."""
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def ended(self) -> str:
        """When, in ISO 8601; "" where it does not say."""
        return str(self.about.get("ended") or self.about.get("started") or "")

    def number(self, name: str) -> float:
        """A metric of the test (``test/acc``), or another number of ``result.json``; NaN where there is none."""
        return self.numbers().get(name, math.nan)

    def numbers(self) -> dict[str, float]:
        """All numbers of ``result.json``, by their own names, whatever part of it they are in."""
        parts = [self.result, *(part for part in self.result.values() if isinstance(part, dict))]
        found = {name: value for part in parts for name, value in part.items()}
        return {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def metrics(self) -> pd.DataFrame:
        """``metrics.csv``; empty where there is none."""
        return _table(self.path / "metrics.csv")

    def statistics(self) -> pd.DataFrame:
        """``statistics.csv`` of the monitor; empty where it did not look, or the file is something else."""
        table = _table(self.path / "statistics.csv")
        return table if {*LAYER_COLUMNS} <= {*table.columns} else pd.DataFrame(columns=list(LAYER_COLUMNS))

    def gradients(self) -> pd.DataFrame:
        """``gradients.csv`` of the gradient monitor; empty where it did not look, or the file is something else."""
        table = _table(self.path / "gradients.csv")
        return table if {*GRADIENT_COLUMNS} <= {*table.columns} else pd.DataFrame(columns=list(GRADIENT_COLUMNS))


def read(paths: Sequence[Path]) -> list[Run]:
    """Every run in run directories, in sweeps' directories, and in directories of these, in the order of their names.

    A job of a sweep that failed before it had a record is a run too. One that is named twice is one.

    Raises:
        SettingError: a path is no directory, or has no run in it.
    """
    return [_read(path) for path in directories(paths)]


def directories(paths: Sequence[Path]) -> list[Path]:
    """The run directories that :func:`read` reads, whole paths.

    Raises:
        SettingError: as there.
    """
    found: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            what = "this is a file" if path.exists() else "there is no such directory"
            raise SettingError(
                "RUNS", path, f"{what}; give run directories (outputs/RUN), or a sweep's (multirun/SWEEP)"
            )
        here = _directories(path)
        if not here:
            raise SettingError(
                "RUNS", path, "there is no run in it; a run directory has a run.json, a sweep's has 0, 1, ..."
            )
        found |= {each.resolve() for each in here}
    return sorted(found, key=_natural)


def root(paths: Sequence[Path]) -> Path:
    """The directory that all of these run directories lie in."""
    return Path(os.path.commonpath([path.resolve().parent for path in paths]))


def short(path: Path, above: Path) -> str:
    """A path for people: relative to the working directory where it lies below it, else with the name of ``above``.

    So that nothing that is shown tells of a machine.
    """
    path, here, above = path.resolve(), Path.cwd(), above.resolve()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    return str(path.relative_to(above.parent)) if path.is_relative_to(above.parent) else str(path)


def _directories(path: Path) -> list[Path]:
    """The run directories at ``path`` and below it; none lies within another."""
    try:
        if _is_run(path):
            return [path]
        inside = sorted(each for each in path.iterdir() if each.is_dir() and not each.is_symlink())
    except OSError as error:  # of another user, for example
        raise SettingError("RUNS", hint=explain(error, path)) from error
    return [found for each in inside for found in _directories(each)]


def _is_run(path: Path) -> bool:
    """Whether it has a record, or is the directory of a sweep's job, which Hydra makes before anything is checked."""
    is_job = re.fullmatch(r"\d+", path.name) is not None and (path / ".hydra").is_dir()
    return is_job or any((path / name).exists() for name in ("run.json", "result.json"))


def _natural(path: Path) -> list[tuple[tuple[int, str], ...]]:
    """Orders job 10 after job 9."""
    return [tuple((int(n or -1), word) for word, n in re.findall(r"(\D*)(\d*)", part)) for part in path.parts]


def _read(path: Path) -> Run:
    parts, troubles = {}, []
    for name, load in (("config.yaml", _yaml), ("run.json", json.loads), ("result.json", json.loads)):
        parts[name], trouble = _load(path / name, load)
        if parts[name] and not _is_whole(name, parts[name]):
            parts[name], trouble = {}, DAMAGED
        if trouble:
            troubles.append(f"{name} {trouble}")
    config, about, result = parts.values()
    status = about.get("status")
    if not about and not (path / "run.json").exists():
        overrides, _ = _load(path / ".hydra" / "overrides.yaml", lambda text: {"all": _yaml(text)})
        asked = " ".join(map(str, overrides.get("all") or [])) or "its settings are not known"
        return Run(path, "failed", f"it failed before training began, or has just started ({asked})", config)
    if status == "running":
        held = lock.is_held(path)
        status = "killed" if held is False else "running"
        killed = "it was killed" if held is False else "it is running" if held else "it is running, or was killed"
        trouble = f"it had not ended when this was computed: {killed}"
    elif status == "interrupted" and about.get("requeued"):
        status, trouble = "requeued", f"it was interrupted, and Slurm's queue has it again (job {about['requeued']})"
    elif status in ("failed", "interrupted"):
        trouble = f"it {'failed' if status == 'failed' else 'was interrupted'}{_reason(path)}"
    elif troubles or not result:
        status, trouble = "no result", "; ".join(troubles) or "there is no result.json"
    else:
        trouble = ""
    return Run(path, str(status), trouble, config, about, result)


def _is_whole(name: str, contents: dict[str, Any]) -> bool:
    if name == "config.yaml":
        return all(isinstance(contents.get(group), dict) for group in GROUPS)
    return not lacks(name.removesuffix(".json"), contents)


def _load(path: Path, load: Any) -> tuple[dict[str, Any], str]:
    """The contents, and what is wrong with them."""
    try:
        contents = load(read_text(path))
    except FileNotFoundError:
        return {}, "is missing"
    except (OSError, SettingError, ValueError, RecursionError, yaml.YAMLError):
        return {}, DAMAGED
    whole = isinstance(contents, dict) and contents and not out_of_range(contents)
    return (contents, "") if whole else ({}, DAMAGED)


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a safe one
    except yaml.YAMLError:  # libyaml does not take surrogates, which stand for bytes of a path in another encoding
        return yaml.safe_load(text)


def _reason(path: Path) -> str:
    """The last line of ``error.txt``, where the run has left one."""
    try:
        lines = read_bytes(path / "error.txt").decode("utf-8", "replace").split("\n")
    except (OSError, SettingError):
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:200]}" if last else ""


def _table(path: Path) -> pd.DataFrame:
    """A CSV file without its last line where that is half written; empty where it cannot be read."""
    try:
        text = read_bytes(path).decode("utf-8", "replace")
        return pd.read_csv(StringIO(text[: text.rfind("\n") + 1]))
    except (OSError, SettingError, ValueError, csv.Error):  # pandas' own errors are ValueErrors
        return pd.DataFrame()
