"""The tables of a page on claims, from which the page can be written again: CSV files, and ``claims.json`` beside them.

The CSV files have all numbers. ``claims.json`` has what they lack: the texts of each claim, and labels of plots.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from syncbn.study.claims.plot_data import COLUMNS
from syncbn.study.claims.report import tables
from syncbn.study.claims.result import CaseLabel, Finding, PlotData, Published, Row, Versus
from syncbn.study.report.write import write_frames
from syncbn.training.atomic_write import replacing, unlinked
from syncbn.training.errors import SettingError

FILE = "claims.json"
CSV = ("verdicts", "cases", "versus", "published", "plots")
TEXTS = ("article", "source", "method", "worse", "better", "problems", "left_out", "command")  # of a finding, in FILE
LABELS = ("name", "title", "x", "y", "x_log", "y_log", "level", "level_label", "least", "most")  # of a plot, in FILE
Result = TypeVar("Result", Row, Versus, Published)


@dataclass(frozen=True)
class Stored:
    """The contents of a page.

    Attributes:
        title, question: of the page.
        name: of its files, without a suffix.
        libraries: the versions with which its numbers were computed.
        findings: one for each claim.
    """

    title: str
    question: str
    name: str
    libraries: str
    findings: list[Finding]


def plot_names(one: Finding) -> list[str]:
    """The names of the files of a claim's plots."""
    return [f"{one.study}-{plot.name}-{at}" for at, plot in enumerate(one.plots, 1)]


def write(page: Stored, directory: Path) -> None:
    """Writes the tables of a page into a directory, which is created if it does not exist."""
    write_frames(tables.frames(page.findings, list(map(plot_names, page.findings))), directory)
    about = {key: getattr(page, key) for key in ("title", "question", "name", "libraries")}
    text = json.dumps(about | {"claims": list(map(_texts, page.findings))}, indent=1, allow_nan=False)
    with replacing(unlinked(directory / FILE)) as draft:
        draft.write_text(f"{text}\n", encoding="utf-8")


def read(directory: Path) -> Stored:
    """Reads the tables of a page.

    Raises:
        SettingError: a table is missing or damaged, or was written by a version without ``claims.json``.
    """
    try:
        about = json.loads((directory / FILE).read_text(encoding="utf-8"))
        rows = {name: _rows(directory / f"{name}.csv") for name in CSV}
        findings = [
            _finding(texts, {name: _of(texts, table) for name, table in rows.items()}) for texts in about["claims"]
        ]
        return Stored(about["title"], about["question"], about["name"], about["libraries"], findings)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        hint = f"the tables of a page on claims cannot be read ({type(error).__name__}: {error})"
        raise SettingError(str(directory), hint=hint) from error


def _texts(one: Finding) -> dict[str, Any]:
    """What the CSV files lack of a finding."""
    about = {"study": one.study} | {name: getattr(one, name) for name in TEXTS}
    about["labels"] = {case: asdict(label) for case, label in one.labels.items()}
    about["plots"] = [{name: getattr(plot, name) for name in LABELS} for plot in one.plots]
    return about


def _rows(path: Path) -> list[dict[str, str]]:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False, name=None)]


def _of(texts: Mapping[str, Any], rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["study"] == texts["study"]]


def _finding(texts: Mapping[str, Any], rows: Mapping[str, Sequence[dict[str, str]]]) -> Finding:
    """A finding from its texts, and its rows of each CSV file."""
    first = rows["verdicts"][0]
    names = [f"{texts['study']}-{plot['name']}-{at}" for at, plot in enumerate(texts["plots"], 1)]
    given: dict[str, Any] = {name: texts[name] for name in ("study", *TEXTS)}
    given |= {name: first[name] for name in ("text", "baseline", "sharing")}
    given |= {name: int(first[name]) for name in ("number", "seeds", "runs", "finished", "diverged")}
    return Finding(
        **given,
        alpha=float(first["alpha"]),
        sides=[row["side"] for row in rows["verdicts"]],
        verdicts={row["side"]: row["verdict"] for row in rows["verdicts"]},
        labels={case: CaseLabel(**label) for case, label in texts["labels"].items()},
        rows=[_result(Row, row) for row in rows["cases"]],
        versus=[_result(Versus, row) for row in rows["versus"]],
        published=[_result(Published, row) for row in rows["published"]],
        plots=[
            PlotData(**labels, frame=_points([row for row in rows["plots"] if row["plot"] == name]))
            for labels, name in zip(texts["plots"], names, strict=True)
        ],
    )


def _result(kind: type[Result], row: Mapping[str, str]) -> Result:
    return kind(**{field.name: _PARSERS[field.type](row[field.name]) for field in fields(kind)})


def _points(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """The data of a plot. Its ``x`` are numbers if all of them are."""
    frame = pd.DataFrame([{name: row[name] for name in COLUMNS} for row in rows], columns=COLUMNS)
    for name in ("mean", "low", "high"):
        frame[name] = frame[name].map(_number).astype(float)
    frame["n"] = frame["n"].astype(int)
    try:
        return frame.assign(x=frame["x"].astype(float))
    except ValueError:
        return frame


def _number(text: str) -> float:
    return float(text) if text else nan


_PARSERS: dict[Any, Callable[[str], Any]] = {  # by the annotation of a field
    str: str,
    int: int,
    float: _number,
    float | None: lambda text: float(text) if text else None,
    bool: lambda text: {"True": True, "False": False}[text],
}
