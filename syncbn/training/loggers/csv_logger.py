"""The logger that writes ``metrics.csv``: one file per run, continued whenever the run resumes."""

import csv
import io
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from syncbn.training.atomic_write import replacing
from syncbn.training.console import print_line


class MetricsFile(Logger):
    """Writes ``metrics.csv`` like Lightning's CSVLogger: one row per call, a column for each metric, and ``step``.

    Unlike CSVLogger, it continues an existing file. A row is written to the operating system before the call returns,
    so a killed process loses no row, except that the last one may be incomplete; an incomplete row is dropped.

    On a resume, :meth:`cut` removes the rows that will be logged again. If an earlier attempt was killed after training
    had ended, there is no such call; a row of the test that is logged again then replaces the earlier one.

    Args:
        directory: directory of the file; only rank 0 reads and writes it.
        file: name of the file.
        columns: names of the first columns, in this order; other columns follow in alphabetical order.
    """

    def __init__(self, directory: Path, file: str = "metrics.csv", columns: Sequence[str] = ()) -> None:
        super().__init__()
        self.path = directory / file
        self._first = list(columns)
        self._columns: list[str] | None = None  # None until the file has been read
        self._rows = 0
        self._earlier = 0  # number of rows of earlier attempts that may be logged again

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
        """Does nothing: the hyperparameters are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self.append([row | {"step": self.rows() if step is None else step}])

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, each with a ``step``; call it on rank 0 only."""
        columns = self._open()
        if self._earlier:
            for row in rows:
                self._remove_earlier(row)
        names = set().union(*rows)
        if not names <= set(columns):
            self._columns = [*self._first, *sorted({*columns, *names} - set(self._first))]
            self._replace(read(self.path))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns or ()).writerows(rows)
        self._rows += len(rows)

    def rows(self) -> int:
        """Number of rows in the file; call it on rank 0 only."""
        self._open()
        return self._rows

    def cut(self, rows: int, step: int) -> None:
        """Remove the rows after the first ``rows`` whose step is ``step`` or later, atomically; for rank 0 only."""
        self._open()
        self._earlier = 0  # the remaining rows are not logged again
        found = read(self.path)
        kept = [row for number, row in enumerate(found) if number < rows or int(row["step"]) < step]
        if len(kept) < len(found):
            self._rows = len(kept)
            self._replace(kept)

    def _remove_earlier(self, row: Mapping[str, Any]) -> None:
        """Remove the row of an earlier attempt that has the same step and the same metrics as ``row``."""
        found = read(self.path)
        repeated = [
            int(each["step"]) == row["step"] and {name for name, value in each.items() if value != ""} == row.keys()
            for each in found[: self._earlier]
        ]
        if any(repeated):
            kept = [each for each, is_repeated in zip(found, repeated, strict=False) if not is_repeated]
            kept += found[self._earlier :]
            self._earlier -= sum(repeated)
            self._rows = len(kept)
            self._replace(kept)

    def _open(self) -> list[str]:
        """Return the columns; the first call reads the file and removes an incomplete last line and damaged rows."""
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
                print_line(f"{self.path} is damaged: {len(rows)} rows were kept; the damaged file is {kept.name}")
                self._replace(rows) if self._columns else self.path.unlink()
        return self._columns

    def _replace(self, rows: Iterable[Mapping[str, str]]) -> None:
        with replacing(self.path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns or ())
            writer.writeheader()
            writer.writerows(rows)


def first_step(trainer: pl.Trainer) -> int:
    """The step of the first row that training will log, when it begins or resumes."""
    # The logged step counts optimizer steps with one optimizer, and batches with several. The smaller number is the
    # right one in both cases: one optimizer steps at most once per batch, several step at least once.
    return min(trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1)


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a ``metrics.csv`` by column, "" where a row has no value; damaged rows are skipped."""
    return _parse(_whole_lines(path))[1]


def _parse(text: bytes) -> tuple[list[str], list[dict[str, str]], bool]:
    """Return the columns, the valid rows, and whether there are invalid ones.

    A row is valid if it has a value for each column, and a whole number as ``step``.
    """
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
    except csv.Error:  # an unterminated quoted field, for example
        damaged = True
    return columns, rows, damaged


def _whole_lines(path: Path) -> bytes:
    """The contents of a file up to its last newline; empty if there is no file."""
    contents = path.read_bytes() if path.exists() else b""
    return contents[: contents.rfind(b"\n") + 1]
