"""Reads what ``write`` has written, and writes pages again without the runs, for example after an update."""

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


def read(directory: Path) -> Comparison:
    """The comparison whose report is in the directory.

    The learning curves may be compressed (``curves.csv.gz``) or missing.

    Raises:
        SettingError: the directory has no such report, or a file of it cannot be read.
    """
    try:
        rest = json.loads((directory / "tables" / write.COMPARISON).read_text(encoding="utf-8"))
        numbers = {"least": -math.inf, "greatest": math.inf, "margin": math.nan}  # JSON has none of these
        metric: dict[str, Any]
        others: dict[str, Any]
        metric, others = (
            {name: numbers[name] if value is None and name in numbers else value for name, value in each.items()}
            for each in (rest.pop("metric"), rest)
        )
        frames = {name: _frame(directory / "tables", name) for name in COLUMNS}
        return Comparison(metric=Metric(**metric), **others, **frames)
    except (OSError, ValueError, TypeError, KeyError) as error:
        hint = f"no report can be read from its tables ({error}); use the directory of a report"
        raise SettingError("DIRECTORY", directory, hint) from error


def rewrite(directory: Path) -> list[Path]:
    """Writes the reports in a directory and below it again, from their tables.

    Returns:
        The paths of the written ``report.html``.

    Raises:
        SettingError: there is no report in the directory, or one cannot be read.
    """
    parts = sorted(directory.glob(f"**/{write.PARTS}"))
    several = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in parts}
    written = [
        write.write_several(
            page["title"], page["question"], {name: read(place / name) for name in page["parts"]}, place
        )
        for place, page in several.items()
    ]
    done = {place / name for place, page in several.items() for name in page["parts"]}
    alone = {path.parents[1] for path in directory.glob(f"**/tables/{write.COMPARISON}")} - done
    written += [write.write(read(place), place) for place in sorted(alone)]
    if not written:
        raise SettingError("DIRECTORY", directory, "there is no report in it; syncbn compare writes one")
    return written


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
