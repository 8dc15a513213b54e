"""Logs each metric of a step once over all attempts of a run, whatever a killed attempt left in a logger's store."""

from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path

from torch import Tensor

from syncbn.training.loggers.csv_logger import read

Points = set[tuple[int, str]]


class EachOnce:
    """Knows which metrics a store has, by step and name.

    ``metrics.csv`` is written first and cut back to the checkpoint by a resume, so what it has and the store lacks was
    lost in a killed attempt.

    Args:
        run_dir: the run directory, with ``metrics.csv``.
        stored: the pairs of step and name that earlier attempts have stored.
    """

    def __init__(self, run_dir: Path, stored: Iterable[tuple[int, str]] = ()) -> None:
        self._csv, self._seen = run_dir / "metrics.csv", set(stored)
        self.step = 0  # of the last metrics

    def new(self, metrics: Mapping[str, object], step: int | None) -> tuple[dict[str, float], int]:
        """The metrics that are numbers and that the store lacks, and their step; they count as stored from now on."""
        self.step = self.step if step is None else step  # what user code logs without a step belongs to the last one
        numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        found = {
            name: float(value)
            for name, value in numbers.items()
            if isinstance(value, Real) and (step is None or (step, name) not in self._seen)
        }
        self._seen.update((self.step, name) for name in found)
        return found, self.step

    def lost(self) -> list[tuple[dict[str, float], int]]:
        """The metrics of ``metrics.csv`` that the store lacks, with their steps."""
        rows = [self.new(_numbers(row), int(row["step"])) for row in read(self._csv)]
        return [(metrics, step) for metrics, step in rows if metrics]


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    found = {}
    for name, text in row.items():
        try:
            found[name] = float(text)
        except ValueError:  # empty, or another value that user code has logged
            continue
    found.pop("step", None)
    return found
