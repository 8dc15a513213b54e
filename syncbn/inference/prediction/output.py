"""Writes the rows: into a CSV file that is whole or does not exist, or onto standard output."""

import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from syncbn.inference.prediction.share import Row
from syncbn.training.atomic_write import replacing
from syncbn.training.console import print_line, printable
from syncbn.training.errors import SettingError
from syncbn.training.os_errors import explain

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes a cell that begins so for a formula
Write = Callable[[Row], None]


class Columns:
    """Makes the cells of a row.

    Args:
        paths: of the files, by index.
        classes: names of the classes; None for their numbers.
        top: number of classes of each file.
    """

    def __init__(self, paths: Sequence[str], classes: Sequence[str] | None, top: int) -> None:
        self.paths, self.classes, self.top = paths, classes or (), top

    def head(self) -> list[str]:
        """``file,class,probability,class_2,probability_2``."""
        more = [f"{name}_{number}" for number in range(2, self.top + 1) for name in ("class", "probability")]
        return ["file", "class", "probability", *more]

    def cells(self, row: Row) -> list[str]:
        """The cells of a row."""
        path = self.paths[row.file]
        cells = [f"./{path}" if path.startswith(FORMULA) else path]
        for number, probability in zip(row.classes, row.probabilities, strict=True):
            cells += [self.name(number), f"{probability:.6f}"]
        return cells

    def name(self, number: int) -> str:
        """The name of a class; its number if it has none."""
        return self.classes[number] if number < len(self.classes) else str(number)


@contextmanager
def to_file(path: Path, columns: Columns) -> Iterator[Write]:
    """Yields a function that writes a row. The file is replaced when the context ends without an exception.

    Raises:
        SettingError: the file cannot be written.
    """
    try:
        if path.is_dir():
            raise SettingError("--out", path, "this is a directory; name a file in it")
        if not path.parent.is_dir():
            raise SettingError("--out", path, f"there is no directory {path.parent}; make it, or use another")
        with replacing(path) as draft:
            try:
                # Bytes of names that are not UTF-8 are written as they are.
                with draft.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(columns.head())
                    yield lambda row: writer.writerow(columns.cells(row))
            except BaseException:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise SettingError("--out", path, explain(error, path)) from error


@contextmanager
def to_terminal(columns: Columns) -> Iterator[Write]:
    """Yields a function that prints a row: CSV into a pipe; class, probability and file in columns on a terminal."""
    if not sys.stdout.isatty():
        print_line(_csv(columns.head()))
        yield lambda row: print_line(_csv(columns.cells(row)))
        return
    width = max([len(printable(each)) for each in columns.classes] or [4])

    def show(row: Row) -> None:
        file, *cells = columns.cells(row)
        pairs = zip(cells[::2], cells[1::2], strict=True)
        print_line("  ".join([*(f"{printable(name):<{width}}  {float(each):.4f}" for name, each in pairs), file]))

    yield show


def _csv(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
