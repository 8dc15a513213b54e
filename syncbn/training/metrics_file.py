"""``metrics.csv``: one file per run, however often the run is stopped and goes on."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


class MetricsFile(Logger):
    """Writes ``metrics.csv`` as Lightning's CSVLogger does: one row a call, columns as they come up, and ``step``.

    Unlike there, a file that is there already goes on, and a row is with the operating system when the call returns, so
    a process that is killed leaves all its rows, the last one perhaps half (which is then dropped).

    Args:
        directory: where the file lies; rank 0 alone reads and writes it.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.path = directory / "metrics.csv"
        self._columns: list[str] | None = None  # None: the file has not been looked at yet
        self._rows = 0

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
        row["step"] = self.rows() if step is None else step
        columns = self._open()
        if not row.keys() <= set(columns):
            self._columns = sorted({*columns, *row})
            self._replace(read(self.path))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns or ()).writerow(row)
        self._rows += 1

    def rows(self) -> int:
        """How many rows the file has, on rank 0."""
        self._open()
        return self._rows

    def cut(self, rows: int, step: int) -> None:
        """Takes out what comes after the first ``rows`` rows for ``step`` or a later one, all or nothing; on rank 0."""
        self._open()
        found = read(self.path)
        kept = [row for number, row in enumerate(found) if number < rows or int(row["step"]) < step]
        if len(kept) < len(found):
            self._rows = len(kept)
            self._replace(kept)

    def _open(self) -> list[str]:
        """The columns; at the first call those of the file, which loses what was written by half."""
        if self._columns is None:
            whole = _whole_lines(self.path)
            if self.path.exists() and len(whole) < self.path.stat().st_size:
                with self.path.open("r+b") as file:
                    file.truncate(len(whole))
            lines = csv.reader(whole.decode().splitlines())
            self._columns = next(lines, [])
            self._rows = sum(1 for _ in lines)
        return self._columns

    def _replace(self, rows: Iterable[Mapping[str, str]]) -> None:
        draft = self.path.with_name(".metrics.csv")
        with draft.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns or ())
            writer.writeheader()
            writer.writerows(rows)
        draft.replace(self.path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a ``metrics.csv`` by column, empty where there is no value; a half-written last one is left out."""
    return list(csv.DictReader(_whole_lines(path).decode().splitlines()))


def _whole_lines(path: Path) -> bytes:
    contents = path.read_bytes() if path.exists() else b""
    return contents[: contents.rfind(b"\n") + 1]
