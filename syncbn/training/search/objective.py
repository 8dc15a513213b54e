"""The value of a run that a sweeper such as Optuna optimizes, which the setting ``objective`` names."""

import math
from pathlib import Path
from typing import Any

from syncbn.training.composition.nearest import suggestion
from syncbn.training.errors import SettingError
from syncbn.training.read_file import DamagedError
from syncbn.training.run_directory import record

TESTS = ("test", "fit", "precise", "corrupted", "adapted", "target")  # parts of result.json with metrics by full names
SMALLER = ("loss", "error", "seconds", "steps")  # the last word of a metric of which less is better
LARGER = ("acc", "accuracy", "f1", "auroc", "top5", "images_per_second")


def value(run_dir: Path, name: str | None) -> float | None:
    """The objective of a finished run.

    Args:
        run_dir: the run directory.
        name: a metric in ``result.json`` or ``metrics.csv``. A validation metric is that of the best checkpoint, or the
            last one if it was not logged with the monitored metric. None: the best value of the monitored metric, or
            with ``mode=test`` the test metric of that name.

    Returns:
        The value; None if no metric was named and there is none.

    Raises:
        SettingError: the run has no metric of this name.
    """
    result = record.read_whole(run_dir, "result")
    if name is None:
        best = record.monitored(run_dir)
        return _tested(run_dir, result) if best is None else best
    known = _results(result)
    if name not in known:
        known |= _validated(run_dir, result)
    if name not in known:
        hint = f"this run has no such metric; {suggestion(name, list(known), 'metric')}"
        raise SettingError("objective", name, hint)
    return known[name]


def direction(name: str | None, monitor: str | None, mode: str | None) -> str:
    """Whether to maximize or minimize the objective; "unknown" if neither settings nor its name show it."""
    if name is None or name == monitor:
        return {"max": "maximize", "min": "minimize"}.get(str(mode), "unknown")
    last = name.rpartition("/")[2]
    return "minimize" if last in SMALLER else "maximize" if last in LARGER else "unknown"


def missing(found: Any) -> str:
    """What is wrong with an objective that no sweeper can use; "" if nothing is."""
    if found is None:
        return "this run has no objective; it has neither trained nor tested"
    return "" if math.isfinite(found) else f"the objective is {found}"


def _tested(run_dir: Path, result: dict[str, Any]) -> float | None:
    """The test metric that has the name of the monitored one: ``test/acc`` for ``val/acc``."""
    try:
        settings = record.settings(run_dir)
    except DamagedError:
        return None
    callbacks = ({} if settings is None else settings).get("callbacks") or {}
    monitor = str((callbacks.get("checkpoint") or {}).get("monitor"))
    found = (result.get("test") or {}).get(f"test/{monitor.rpartition('/')[2]}")
    return None if found is None else float(found)


def _results(result: dict[str, Any]) -> dict[str, float]:
    numbers = {key: each for key, each in result.items() if isinstance(each, int | float)}
    for part in (*TESTS, "monitored"):
        numbers |= {key: each for key, each in (result.get(part) or {}).items() if isinstance(each, int | float)}
    return {key: float(each) for key, each in numbers.items()}


def _validated(run_dir: Path, result: dict[str, Any]) -> dict[str, float]:
    """The metrics of ``metrics.csv``: those logged with the best value of the monitored metric, else the last ones."""
    from syncbn.training.loggers.csv_logger import read  # imports Lightning

    rows = read(run_dir / "metrics.csv")
    monitor, best = next(iter((result.get("monitored") or {}).items()), (None, None))
    at_best = [row for row in rows if monitor and row.get(monitor) and float(row[monitor]) == best]
    found: dict[str, float] = {}
    for row in [*rows, *at_best[:1]]:
        found |= {key: number for key, text in row.items() if (number := _number(text)) is not None}
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
