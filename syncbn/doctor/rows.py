"""What a check found: rows, and how they are shown, as a table or as JSON."""

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
    """How good it is. Training may still go well with a warning."""

    ok = "ok"
    warning = "warning"
    failed = "FAILED"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        check: what was looked at.
        found: what is there.
        status: how good that is.
        fix: what to do about it, for all but ok.
        figures: the numbers that ``found`` tells of, for programs; a unit is in the name.
    """

    check: str
    found: str
    status: Status = Status.ok
    fix: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def ok(check: str, found: str) -> Row:
    """A row with nothing to do about."""
    return Row(check, found)


def warning(check: str, found: str, fix: str) -> Row:
    """A row on what may cost time or surprise."""
    return Row(check, found, Status.warning, fix)


def failed(check: str, found: str, fix: str) -> Row:
    """A row on what stops training, or spoils it."""
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
    """Prints the table and the verdict; what does not fit into a column goes on in its next line, whole."""
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
    """The same as one object: ``ok``, ``verdict`` and ``rows``."""
    everything = {
        "ok": not any(row.status == Status.failed for row in rows),
        "verdict": verdict(rows),
        "rows": [asdict(row) | {"figures": _finite(row.figures)} for row in rows],
    }
    return json.dumps(everything, indent=2, allow_nan=False)


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity; an error that is not finite is null."""
    return {name: value if isfinite(value) else None for name, value in figures.items()}
