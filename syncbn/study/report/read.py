"""Reads what ``write`` has written, so that a page can be written again without the runs."""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from syncbn.study.compare import compare, layers, reference_figures
from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.runs.metric import Metric
from syncbn.study.report import write
from syncbn.training.errors import SettingError

COLUMNS = {
    "runs": compare.RUNS,
    "means": compare.MEANS,
    "effects": compare.EFFECTS,
    "curves": compare.CURVES,
    "cost": compare.COST,
    "layers": layers.COLUMNS,
    "confirmations": compare.CONFIRMATIONS,
    "expected": reference_figures.COLUMNS,
}
WORDS = {"side", "condition", "how", "path", "status", "why", "layer", "metric", "verdict"}
WORDS |= {"what", "published", "ours", "agrees", "source", "differences"}

NUMBERS = {"least": -math.inf, "greatest": math.inf, "margin": math.nan}  # written as null


def read(directory: Path) -> Comparison:
    """The comparison whose report is in the directory.

    The learning curves may be compressed (``curves.csv.gz``) or missing.

    Raises:
        SettingError: the directory has no such report, or a file of it cannot be read.
    """
    try:
        rest = json.loads((directory / "tables" / write.COMPARISON).read_text(encoding="utf-8"))
        rest["metric"] = Metric(**_with_numbers(rest["metric"]))
        frames = {name: _frame(directory / "tables", name) for name in COLUMNS}
        return Comparison(**_with_numbers(rest), **frames)
    except (OSError, ValueError, TypeError, KeyError) as error:
        hint = f"no report can be read from its tables ({error}); use the directory of a report"
        raise SettingError("DIRECTORY", directory, hint) from error


def _with_numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with the numbers that JSON does not have."""
    return {name: NUMBERS[name] if value is None and name in NUMBERS else value for name, value in fields.items()}


def _frame(directory: Path, name: str) -> pd.DataFrame:
    path = directory / f"{name}.csv"
    if name == "curves" and not path.exists():
        path = directory / f"{name}.csv.gz"
        if not path.exists():
            return pd.DataFrame(columns=COLUMNS[name])
    columns = COLUMNS[name]
    words: Any = {column: str for column in columns if column in WORDS}
    frame = pd.read_csv(
        path, dtype=words, keep_default_na=False, na_values={c: [""] for c in columns if c not in WORDS}
    )
    if list(frame.columns) != columns:
        raise ValueError(f"{path.name} has other columns")
    if "differences" in columns:
        frame["differences"] = [tuple(map(float, filter(None, text.split("; ")))) for text in frame.differences]
    if name == "runs":
        frame = frame.astype({"seed": "Int64"})
    return frame
