"""``metrics.csv`` and its like: one file per run, however often the run is stopped and goes on."""

import csv
import io
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from syncbn.training.atomic_write import replacing
from syncbn.training.console import print_line


class MetricsFile(Logger):
    """Writes ``metrics.csv`` as Lightning's CSVLogger does: one row a call, columns as they come up, and ``step``.

    Unlike there, a file that is there already goes on, and a row is with the operating system when the call returns, so
    a process that is killed leaves all its rows, the last one perhaps half (which is then dropped).

    Where training does not go on, since it was over when an earlier attempt was killed, nothing is cut; a row that is
    logged again (of the test) then takes the place of the one before.

    Args:
        directory: where the file lies; rank 0 alone reads and writes it.
        file: its name.
        columns: those that come first, in this order; others follow by name.
    """

    def __init__(self, directory: Path, file: str = "metrics.csv", columns: Sequence[str] = ()) -> None:
        super().__init__()
        self.path = directory / file
        self._first = list(columns)
        self._columns: list[str] | None = None  # None: the file has not been looked at yet
        self._rows = 0
        self._earlier = 0  # how many rows are of earlier attempts and may come again

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: they are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.append([row | {"step": self.rows() if step is None else step}])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows that have a ``step`` each; on rank 0."""
        columns = self._open()
        if self._earlier:
            for row in rows:
                self._take_out(row)
        names = set().union(*rows)
        if not names <= set(columns):
            self._columns = [*self._first, *sorted({*columns, *names} - set(self._first))]
            self._replace(read(self.path))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns or ()).writerows(rows)
        self._rows += len(rows)

    def rows(self) -> int:
        """How many rows the file has, on rank 0."""
        self._open()
        return self._rows

    def cut(self, rows: int, step: int) -> None:
        """Takes out what comes after the first ``rows`` rows for ``step`` or a later one, all or nothing; on rank 0."""
        self._open()
        self._earlier = 0  # what stays does not come again
        found = read(self.path)
        kept = [row for number, row in enumerate(found) if number < rows or int(row["step"]) < step]
        if len(kept) < len(found):
            self._rows = len(kept)
            self._replace(kept)

    def _take_out(self, row: Mapping[str, Any]) -> None:
        """Takes out the row of an earlier attempt that has the step and the metrics of this one."""
        found = read(self.path)
        again = [
            int(each["step"]) == row["step"] and {name for name, value in each.items() if value != ""} == row.keys()
            for each in found[: self._earlier]
        ]
        if any(again):
            kept = [each for each, is_again in zip(found, again, strict=False) if not is_again] + found[self._earlier :]
            self._earlier -= sum(again)
            self._rows = len(kept)
            self._replace(kept)

    def _open(self) -> list[str]:
        """The columns; at the first call those of the file, which loses what was written by half, or is damaged."""
        if self._columns is None:
            whole = _whole_lines(self.path)
            if self.path.exists() and len(whole) < self.path.stat().st_size:
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
            self._columns, rows, damaged = _parse(whole)
            self._rows = self._earlier = len(rows)
            if damaged:
                kept = self.path.with_name(f"damaged-{self.path.name}")
                shutil.copyfile(self.path, kept)
                print_line(f"{self.path} is damaged: {len(rows)} rows of it are kept, all of it is {kept.name}")
                self._replace(rows) if self._columns else self.path.unlink()
        return self._columns

    def _replace(self, rows: Iterable[Mapping[str, str]]) -> None:
        with replacing(self.path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns or ())
            writer.writeheader()
            writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv`` by column, empty where there is no value; damaged ones are left out."""
    return _parse(_whole_lines(path))[1]


def _parse(text: bytes) -> tuple[list[str], list[dict[str, str]], bool]:
    """The columns, the rows, and whether something else is there as well: a row has its columns and a step."""
    found = csv.reader(io.StringIO(text.decode(errors="replace"), newline=""))
    rows, damaged = [], False
    try:
        columns = next(found, [])
        if text and "step" not in columns:
            return [], [], True
        for values in filter(None, found):
            row = dict(zip(columns, values, strict=False))
            if len(values) == len(columns) and re.fullmatch("-?[0-9]+", row["step"]):
                rows.append(row)
            else:
                damaged = True
    except csv.Error:  # a field without an end
        damaged = True
    return columns, rows, damaged


def _whole_lines(path: Path) -> bytes:
    contents = path.read_bytes() if path.exists() else b""
    return contents[: contents.rfind(b"\n") + 1]
