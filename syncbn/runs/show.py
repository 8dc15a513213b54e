"""Writes the list as aligned columns, CSV or JSON."""

import csv
import io
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from syncbn.runs.names import ABSENT, text, value
from syncbn.runs.read import Run
from syncbn.training.console import printable

LONGEST = 24  # characters of a value of a setting
LONGEST_ERROR = 100
ROOM_FOR_ERROR = 24  # at least, on a terminal
NUMBER = re.compile(r"[-+.,\de]*|nan|-?inf")
LABELS = {"images_per_second": "images/s"}
STYLES = {"finished": "green", "running": "cyan", "failed": "red", "killed": "red", "damaged": "red"}
GAP = "  "


class Columns(NamedTuple):
    """What is shown of each run, by the names of fields, settings and metrics.

    Attributes:
        order: all columns, from left to right.
        optional: those that are left out where the terminal has no room for them, the most important ones first.
        error: whether failed runs have a reason to show; it comes last.
    """

    order: list[str]
    optional: list[str]
    error: bool


def table(runs: Sequence[Run], columns: Columns, width: int | None) -> Iterator[tuple[str, str]]:
    """The lines of the list, each with the status of its run: the head and the last lines have none.

    Args:
        runs: to show.
        columns: what to show of them.
        width: of the terminal; columns that do not fit are named in the last line. None: all are shown.
    """
    cells = {name: _column(runs, name) for name in columns.order}
    error = [_shortened(run.error, LONGEST_ERROR, keep_end=False) for run in runs] if columns.error else []
    widths = {name: max(map(_width, each)) for name, each in cells.items()}
    chosen = list(columns.order) if width is None else _fitting(columns, widths, width - _room_for(error))
    rows = [[cells[name][0] for name in chosen] + ["error"] * columns.error]
    rows += [[cells[n][i] for n in chosen] + error[i - 1 : i] for i in range(1, len(runs) + 1)]
    numeric = {n for n in chosen if all(NUMBER.fullmatch(each) for each in cells[n][1:])}
    for number, row in enumerate(rows):
        padded = [
            each.rjust(widths[name]) if name in numeric else each + " " * (widths[name] - _width(each))
            for name, each in zip(chosen, row, strict=False)
        ]
        line = GAP.join([*padded, *row[len(chosen) :]]).rstrip()
        yield (line if width is None else _cut(line, width)), (runs[number - 1].status if number else "")
    yield "", ""
    counts = Counter(run.status for run in runs)
    yield f"{len(runs)} run{'s' * (len(runs) != 1)}: {', '.join(f'{n} {each}' for each, n in counts.most_common())}", ""
    if left_out := [name for name in columns.order if name not in chosen]:
        yield f"no room for {', '.join(left_out)}; --columns chooses others, and a pipe gets all", ""


def _fitting(columns: Columns, widths: dict[str, int], room: int) -> list[str]:
    """The columns for which there is room, from left to right."""
    room -= sum(widths[name] + len(GAP) for name in columns.order if name not in columns.optional)
    kept = set()
    for name in columns.optional:
        if widths[name] + len(GAP) <= room:
            kept.add(name)
            room -= widths[name] + len(GAP)
    return [name for name in columns.order if name in kept or name not in columns.optional]


def _room_for(error: Sequence[str]) -> int:
    """Characters for the errors, which are cut at the edge of the terminal."""
    return min(ROOM_FOR_ERROR, max(map(len, error), default=0))


def as_csv(runs: Sequence[Run], columns: Columns) -> str:
    """The list as CSV: full precision, full values."""
    names = [*columns.order, *(["error"] if columns.error else [])]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_exact(value(run, name)) for name in names] for run in runs)
    return file.getvalue()


def as_json(runs: Sequence[Run]) -> str:
    """The list as JSON, one object per run with all of its settings and metrics."""
    return "[\n" + ",\n".join(json.dumps(_object(run), default=str) for run in runs) + "\n]"


def terminal_width() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size().columns


def _object(run: Run) -> dict[str, Any]:
    fields = {name: getattr(run, "path" if name == "run" else name) or None for name in ("run", "status", "error")}
    times = {"started": run.started or None, "ended": run.ended or None, "tests": run.tests or None}
    numbers = {name: each if math.isfinite(each) else None for name, each in run.numbers.items()}
    return fields | times | {"metrics": numbers, "settings": run.settings}


def _exact(each: Any) -> str:
    if isinstance(each, float):
        return repr(each)
    return text(each)


def _column(runs: Sequence[Run], name: str) -> list[str]:
    """The head and the cells of a column."""
    cells = [_shown(run, name) for run in runs]
    return [LABELS.get(name, _head(name)), *cells]


def _head(name: str) -> str:
    for end in ("._target_", ".name"):
        name = name.removesuffix(end)
    return _shortened(printable(name), 32)


def _shown(run: Run, name: str) -> str:
    each = value(run, name)
    if name == "started" and each:
        return str(each)[:16]
    if name == "run":
        return printable(each)
    if name == "images_per_second" and isinstance(each, float) and math.isfinite(each):
        return f"{each:,.0f}"
    shown = "" if each is ABSENT or (each is None and name in run.numbers) else text(each, name)
    return _shortened(printable(shown), LONGEST)


def _shortened(shown: str, longest: int, *, keep_end: bool | None = None) -> str:
    """A value with at most so many characters; of a path the end is kept."""
    if len(shown) <= longest:
        return shown
    if keep_end or (keep_end is None and "/" in shown):
        return f"...{shown[3 - longest :]}"
    return f"{shown[: longest - 3]}..."


def _width(shown: str) -> int:
    if shown.isascii():
        return len(shown)
    from rich.cells import cell_len

    return cell_len(shown)


def _cut(line: str, width: int) -> str:
    """A line that fits the terminal; the column of errors comes last."""
    return line if len(line) <= width else f"{line[: max(width - 3, 0)]}..."
