"""The table of an evaluation: a row for each checkpoint, columns for each data set and metric."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from syncbn.training.atomic_write import replacing
from syncbn.training.composition.nearest import suggestion
from syncbn.training.console import cell as printable_cell
from syncbn.training.errors import SettingError
from syncbn.training.os_errors import explain
from syncbn.training.run_directory.paths import short

USUAL = ("test/acc", "test/loss")
FORMULA = ("=", "+", "-", "@")  # a spreadsheet takes a cell that begins so for a formula


class Cell(NamedTuple):
    """The test of one checkpoint on one data set.

    Attributes:
        run: the checkpoint or its run directory, as it was typed.
        data: the label of the data set.
        metrics: by name; empty if the test failed.
        error: why it failed, in one line.
        directory: of the test; None if it did not begin.
    """

    run: str
    data: str
    metrics: dict[str, float]
    error: str = ""
    directory: Path | None = None

    def line(self, number: int, total: int) -> str:
        """The line that is printed when the test has ended."""
        shown = ", ".join(f"{name} {_number(self.metrics[name])}" for name in USUAL if name in self.metrics)
        return f"{number} of {total}: {self.run} on {self.data}: {'failed' if self.error else shown or 'done'}"


def names(cells: Sequence[Cell], asked: Sequence[str]) -> list[str]:
    """The metrics to show: those asked for; else the accuracy, and with one data set the loss, or all of the test."""
    there = {name for cell in cells for name in cell.metrics}
    several = len({cell.data for cell in cells}) > 1
    usual = [name for name in USUAL[: 1 if several else 2] if name in there]
    usual = usual or sorted(name for name in there if name.startswith("test/"))
    return [name for name in asked if name in there] or usual or [USUAL[0]]


def check(cells: Sequence[Cell], asked: Sequence[str]) -> None:
    """Refuses a metric that no test has; the results have been written by then.

    Raises:
        SettingError: the hint names the nearest.
    """
    there = sorted({name for cell in cells for name in cell.metrics})
    for name in asked:
        if there and name not in there:
            raise SettingError("--metric", name, f"no test has it; {suggestion(name, there, 'metric')}")


def show(cells: Sequence[Cell], metrics: Sequence[str]) -> None:
    """Prints the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:  # in a file or a pipe the table keeps its full width
        console.width = 1000
    data = list(dict.fromkeys(cell.data for cell in cells))
    table = Table(box=box.HORIZONTALS)
    table.add_column("checkpoint")
    for each in data:
        for name in metrics:
            table.add_column(printable_cell(f"{each} {name}"), justify="right")
    by_pair = {(cell.run, cell.data): cell for cell in cells}
    for run in dict.fromkeys(cell.run for cell in cells):
        shown = [_shown(by_pair[run, each], name, first=name == metrics[0]) for each in data for name in metrics]
        table.add_row(printable_cell(run), *map(printable_cell, shown))
    console.print()
    console.print(table)


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Writes all metrics as CSV, or as JSON if the file's name ends so.

    Raises:
        SettingError: the file cannot be written.
    """
    try:
        with replacing(path) as draft:
            if path.suffix == ".json":
                draft.write_text(_json(cells), encoding="utf-8", errors="surrogateescape")
            else:
                _write_csv(draft, cells)
    except OSError as error:
        raise SettingError("--out", path, explain(error, path)) from error


def _write_csv(path: Path, cells: Sequence[Cell]) -> None:
    metrics = list(dict.fromkeys(name for cell in cells for name in cell.metrics))
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["checkpoint", "data", *metrics, "error", "directory"])
        for cell in cells:
            values = [repr(cell.metrics[name]) if name in cell.metrics else "" for name in metrics]
            run = f"./{cell.run}" if cell.run.startswith(FORMULA) else cell.run
            writer.writerow([run, cell.data, *values, cell.error, _directory(cell)])


def _json(cells: Sequence[Cell]) -> str:
    rows = [
        {
            "checkpoint": cell.run,
            "data": cell.data,
            "metrics": {name: each if math.isfinite(each) else None for name, each in cell.metrics.items()},
            "error": cell.error or None,
            "directory": _directory(cell) or None,
        }
        for cell in cells
    ]
    return json.dumps(rows, indent=2) + "\n"


def _directory(cell: Cell) -> str:
    return "" if cell.directory is None else short(cell.directory)


def _shown(cell: Cell, name: str, *, first: bool) -> str:
    if cell.error:
        return "failed" if first else ""
    return _number(cell.metrics[name]) if name in cell.metrics else ""


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
