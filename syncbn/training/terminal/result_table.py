"""Draws the table of results: labels and values between two rules, of which no value is cut."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult

from syncbn.training.console import cell, printable

WIDEST = 78  # characters of a rule


class ResultTable:
    """A table of two columns. A terminal breaks a value that is too long, so a path can be copied whole.

    Args:
        rows: label and value of each row.
    """

    def __init__(self, rows: Sequence[tuple[str, str]]) -> None:
        self._rows = [(printable(label), printable(value)) for label, value in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        labels, values = (max(map(cell_len, column), default=0) for column in zip(*self._rows, strict=True))
        width = min(labels + values + 6, options.max_width - 2, WIDEST)
        rule = cell(f" {('-' if options.ascii_only else '─') * width}")
        yield rule
        for label, value in self._rows:
            line = cell(f"  {label}{' ' * (labels - cell_len(label))}", "bold")
            yield line.append_text(cell(f"   {value}", "not bold"))
        yield rule
