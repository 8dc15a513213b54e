"""Reads run directories. Failed and damaged runs are included, with the files that are readable."""

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
from syncbn.training.run_directory.kinds import missing_value

GRADIENT_COLUMNS = ("step", "layer", "depth", "norm")
LAYER_COLUMNS = ("step", "layer", "device_batch", "group_batch", "spread", "effective_batch", "variance_ratio")
DAMAGED = "cannot be read: it is damaged"
# The loader of libyaml is ten times as fast; PyYAML may be built without it.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: of the directory.
        status: "finished", "failed", "interrupted", "requeued", "running", "killed" or "no result". A run is "killed"
            if its ``run.json`` says "running" but no process holds its lock. A run has "no result" if it finished, or
            if its exit status is unknown, and one of its three files is missing or damaged.
        trouble: what is wrong with the run, for display; "" if it finished and its files are complete.
        config: ``config.yaml``; empty if it is unreadable.
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
        """The seed; None if the settings are unreadable."""
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def ended(self) -> str:
        """The time of the end, else of the start, in ISO 8601; "" if neither is recorded."""
        return str(self.about.get("ended") or self.about.get("started") or "")

    def number(self, name: str) -> float:
        """A metric of the test (``test/acc``) or another number of ``result.json``; NaN if it is missing."""
        return self.numbers().get(name, math.nan)

    def numbers(self) -> dict[str, float]:
        """All numbers of ``result.json`` and its sections, by name without the section."""
        parts = [self.result, *(part for part in self.result.values() if isinstance(part, dict))]
        found = {name: value for part in parts for name, value in part.items()}
        return {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def metrics(self) -> pd.DataFrame:
        """``metrics.csv``; empty if it is missing."""
        return _read_csv(self.path / "metrics.csv")

    def statistics(self) -> pd.DataFrame:
        """``statistics.csv`` of the statistics monitor; empty if it is missing or has other columns."""
        return _read_csv(self.path / "statistics.csv", LAYER_COLUMNS)

    def gradients(self) -> pd.DataFrame:
        """``gradients.csv`` of the gradient monitor; empty if it is missing or has other columns."""
        return _read_csv(self.path / "gradients.csv", GRADIENT_COLUMNS)


def read(paths: Sequence[Path]) -> list[Run]:
    """Reads every run in run directories, sweep directories and parent directories of these, sorted by path.

    A sweep's job that failed before it wrote ``run.json`` counts as a run. A run that is named twice is read once.
    Errors are those of :func:`directories`.
    """
    return [_read(path) for path in directories(paths)]


def directories(paths: Sequence[Path]) -> list[Path]:
    """The run directories that :func:`read` reads, as absolute paths.

    Raises:
        SettingError: a path is not a directory, or contains no run.
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
    return sorted(found, key=_natural_order)


def root(paths: Sequence[Path]) -> Path:
    """The common parent directory of the run directories."""
    return Path(os.path.commonpath([path.resolve().parent for path in paths]))


def short(path: Path, above: Path) -> str:
    """A path for display: relative to the working directory if possible, else to the parent directory of ``above``.

    Reports therefore do not contain the machine's absolute paths.
    """
    path, here, above = path.resolve(), Path.cwd(), above.resolve()
    if path.is_relative_to(here):
        return str(path.relative_to(here))
    return str(path.relative_to(above.parent)) if path.is_relative_to(above.parent) else str(path)


def _directories(path: Path) -> list[Path]:
    """The run directories at and below ``path``. A run directory is not searched for others."""
    try:
        if _is_run(path):
            return [path]
        inside = sorted(each for each in path.iterdir() if each.is_dir() and not each.is_symlink())
    except OSError as error:  # for example a directory of another user
        raise SettingError("RUNS", hint=explain(error, path)) from error
    return [found for each in inside for found in _directories(each)]


def _is_run(path: Path) -> bool:
    """Whether it has a ``run.json`` or ``result.json``, or is a sweep's job, whose directory Hydra creates first."""
    is_job = re.fullmatch(r"\d+", path.name) is not None and (path / ".hydra").is_dir()
    return is_job or any((path / name).exists() for name in ("run.json", "result.json"))


def _natural_order(path: Path) -> list[tuple[tuple[int, str], ...]]:
    """A sort key that puts job 10 after job 9."""
    return [tuple((int(n or -1), word) for word, n in re.findall(r"(\D*)(\d*)", part)) for part in path.parts]


def _read(path: Path) -> Run:
    parts, troubles = {}, []
    for name, load in (("config.yaml", _yaml), ("run.json", json.loads), ("result.json", json.loads)):
        parts[name], trouble = _load(path / name, load)
        if parts[name] and not _is_complete(name, parts[name]):
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
        trouble = f"it {'failed' if status == 'failed' else 'was interrupted'}{_last_error_line(path)}"
    elif troubles or not result:
        status, trouble = "no result", "; ".join(troubles) or "there is no result.json"
    else:
        trouble = ""
    return Run(path, str(status), trouble, config, about, result)


def _is_complete(name: str, contents: dict[str, Any]) -> bool:
    if name == "config.yaml":
        return all(isinstance(contents.get(group), dict) for group in GROUPS)
    return not missing_value(name.removesuffix(".json"), contents)


def _load(path: Path, load: Any) -> tuple[dict[str, Any], str]:
    """The contents, and an error message or ""."""
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
        return yaml.load(text, _Loader)  # a safe loader
    except yaml.YAMLError:  # libyaml rejects surrogates, which represent undecodable bytes of a path
        return yaml.safe_load(text)


def _last_error_line(path: Path) -> str:
    """The last line of ``error.txt``; "" if there is no such file."""
    try:
        lines = read_bytes(path / "error.txt").decode("utf-8", "replace").split("\n")
    except (OSError, SettingError):
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:200]}" if last else ""


def _read_csv(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file without an incomplete last line; empty if the file is unreadable or lacks one of the columns."""
    try:
        text = read_bytes(path).decode("utf-8", "replace")
        table = pd.read_csv(StringIO(text[: text.rfind("\n") + 1]))
    except (OSError, SettingError, ValueError, csv.Error):  # pandas' errors are subclasses of ValueError
        table = pd.DataFrame()
    return table if {*columns} <= {*table.columns} else pd.DataFrame(columns=list(columns))
