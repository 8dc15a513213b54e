"""The rows of the doctor's report, and their output as a table or as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from math import isfinite

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncbn.training.console import cell


class Status(StrEnum):
    """Result of a check. With a warning, training may still work."""

    ok = "ok"
    warning = "warning"
    failed = "FAILED"


@dataclass(frozen=True)
class Row:
    """One row of the report.

    Args:
        check: name of the check.
        found: what the check found.
        status: result of the check.
        fix: suggested action, unless the status is ok.
        figures: the numbers in ``found``, for programs; the name includes the unit.
    """

    check: str
    found: str
    status: Status = Status.ok
    fix: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def ok(check: str, found: str) -> Row:
    """A row that needs no action."""
    return Row(check, found)


def warning(check: str, found: str, fix: str) -> Row:
    """A row on something that may cost time or cause unexpected behaviour."""
    return Row(check, found, Status.warning, fix)


def failed(check: str, found: str, fix: str) -> Row:
    """A row on something that prevents training or makes its results wrong."""
    return Row(check, found, Status.failed, fix)


def verdict(rows: Sequence[Row]) -> str:
    """The last line: ``all well``, or how many failed."""
    counts = {status: sum(row.status == status for row in rows) for status in Status}
    warnings = f"{counts[Status.warning]} warning{'s' if counts[Status.warning] != 1 else ''}"
    if counts[Status.failed]:
        also = f", {warnings}" if counts[Status.warning] else ""
        return f"{counts[Status.failed]} of {len(rows)} checks FAILED{also}"
    return f"all well, {warnings}" if counts[Status.warning] else "all well"


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table and the verdict; text that is too wide for its column is wrapped, never cut."""
    styles = {Status.ok: "green", Status.warning: "yellow", Status.failed: "bold red"}
    table = Table(box=box.HORIZONTALS, header_style="bold")
    table.add_column("check", overflow="fold", max_width=24)
    table.add_column("", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for row in rows:
        advice = f"\nfix: {row.fix}" if row.fix else ""
        found = Text("\n").join(map(cell, (row.found + advice).split("\n")))
        table.add_row(cell(row.check), cell(row.status.value, styles[row.status]), found)
    console.print(table)
    console.print(cell(verdict(rows)))


def to_json(rows: Sequence[Row]) -> str:
    """Return the report as one JSON object with ``ok``, ``verdict`` and ``rows``."""
    report = {
        "ok": not any(row.status == Status.failed for row in rows),
        "verdict": verdict(rows),
        "rows": [asdict(row) | {"figures": _finite(row.figures)} for row in rows],
    }
    return json.dumps(report, indent=2, allow_nan=False)


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """Replace numbers that are not finite by None, since JSON has no infinity."""
    return {name: value if isfinite(value) else None for name, value in figures.items()}
