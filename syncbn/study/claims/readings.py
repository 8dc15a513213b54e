"""Reads from run directories the number of each norm and seed, and reports what is missing."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from syncbn.study.cells import Cell
from syncbn.study.claims.censored import Number, minus, over
from syncbn.study.claims.rules.rule import LARGEST, Reading
from syncbn.study.compare.runs import run_reader
from syncbn.study.compare.runs.metric import Metric, choose, shown
from syncbn.study.compare.runs.run_reader import Run
from syncbn.study.format import plural
from syncbn.training.errors import SettingError

TARGET = "target/"  # prefix of metrics on reaching a target accuracy
REACHED = "target/reached"
CENSORED = ("target/steps", "target/seconds")


class Results:
    """The runs of a study, each read once.

    Attributes:
        runs: the runs whose directory contains a run, by directory.
    """

    def __init__(self, cells: Sequence[Cell], root: Path) -> None:
        self._cells, self._root = list(cells), root
        self.runs = {cell.directory: run for cell in cells if (run := _read(cell.directory))}
        # A run repeated as processes has another directory name. It only confirms, and is in no pair.
        alone = [cell for cell in cells if cell.directory.name == str(cell.seed)]
        self._at = {(cell.part, cell.condition, cell.side, cell.seed): cell for cell in alone}
        self._metrics: dict[str, Metric] = {}

    def seeds(self, part: str) -> list[int]:
        """The seeds of a part, in order."""
        return sorted({seed for name, _, _, seed in self._at if name == part})

    def is_planned(self, part: str, condition: str, side: str) -> bool:
        """Whether the budget includes such runs."""
        return any((part, condition, side, seed) in self._at for seed in self.seeds(part))

    def planned(self, *read: tuple[Reading, str]) -> int:
        """The number of seeds for which the budget includes all runs of the given pairs of a reading and a side."""
        return sum(
            all((reading.part, each, side, seed) in self._at for reading, side in read for each in reading.asked)
            for seed in self.seeds(read[0][0].part)
        )

    def run(self, part: str, condition: str, side: str, seed: int) -> Run | None:
        """The run, if it finished with a readable result; else None."""
        cell = self._at.get((part, condition, side, seed))
        run = self.runs.get(cell.directory) if cell else None
        return run if run and not run.trouble else None

    def metric(self, name: str) -> Metric:
        """The metric of this name, with label and unit from the runs' values."""
        if name not in self._metrics:
            try:
                self._metrics[name] = choose(name, [run for run in self.runs.values() if not run.trouble])
            except SettingError:  # no run has the metric
                self._metrics[name] = Metric(name, name.replace("/", " ").replace("_", " "), "", "lower", "")
        return self._metrics[name]

    def value(self, part: str, condition: str, side: str, seed: int, metric: str) -> float | None:
        """A metric as it is shown, finite or not; None if there is no run, or the run does not have the metric."""
        run = self.run(part, condition, side, seed)
        return shown(self.metric(metric), run) if run and metric in run.numbers() else None

    def measured(self, reading: Reading) -> Metric:
        """The metric that a reading results in, with its label."""
        metric = self.metric(reading.metric)
        if reading.less:
            return replace(metric, label=f"{metric.label} less that at {reading.less}")
        if reading.over != LARGEST:
            return metric
        most = f"{reading.usable:g} {metric.unit}".rstrip()
        return Metric(metric.name, f"largest condition with {metric.label} of {most} at most", "", "higher", "")

    def number(self, reading: Reading, side: str, seed: int) -> Number | None:
        """The number of a side and seed by the reading; None if one of its runs is missing."""
        seen = {each: self._run_number(reading, each, side, seed) for each in reading.asked}
        there = {each: number for each, number in seen.items() if number is not None}
        if len(there) < len(seen):
            return None
        number = over(reading, [there[each] for each in reading.conditions])
        return minus(number, there[reading.less]) if reading.less else number

    def note_on_bounds(self, reading: Reading, side: str) -> str:
        """A note on a side's numbers that are bounds or omit conditions; "" if there are none."""
        numbers = [self.number(reading, side, seed) for seed in self.seeds(reading.part)]
        found = [number for number in numbers if number is not None]
        told = []
        if reading.over == LARGEST:
            told += [(sum(number.is_least for number in found), "could use the largest that was tried")]
            told += [(sum(number.is_most for number in found), "could use none, and count with the smallest")]
            words = "; ".join(f"{count} of {len(found)} {what}" for count, what in told if count)
        else:
            words = self._missed_target(reading, side, found)
        return f"{side}: {words}" if words else ""

    def _missed_target(self, reading: Reading, side: str, found: Sequence[Number]) -> str:
        """Words on runs that did not reach their target; "" if all did."""
        seen = [
            number
            for condition in reading.asked
            for seed in self.seeds(reading.part)
            if (number := self._run_number(reading, condition, side, seed))
        ]
        late, what = sum(number.is_least for number in seen), reading.metric.removeprefix(TARGET)
        if not late:
            return ""
        words = f"{late} of {len(seen)} did not get there"
        if reading.over != "best" or reading.wants != "lower":
            return f"{words}; they count with the {what} that they trained"
        words += "; the best of those that did counts"
        nowhere = sum(number.is_least for number in found)
        return words + (f", and where none did ({nowhere} of {len(found)}) the most {what} trained" if nowhere else "")

    def _run_number(self, reading: Reading, condition: str, side: str, seed: int) -> Number | None:
        """The metric of a run, infinite if the run diverged and the reading is ``highest``; None if it is missing."""
        run = self.run(reading.part, condition, side, seed)
        value = self.value(reading.part, condition, side, seed, reading.metric)
        if value is None or run is None:
            return None
        if reading.over == LARGEST and run.number("diverged") == 1:
            value = math.inf
        is_late = reading.metric in CENSORED and run.number(REACHED) == 0
        return Number(abs(value) if reading.magnitude else value, is_late)

    def problems(self) -> list[str]:
        """One line for each failed run, and one for each part, condition and side with missing runs."""
        lines, missing = [], dict[Path, list[str]]()
        for cell in self._cells:
            run = self.runs.get(cell.directory)
            if run is None:
                missing.setdefault(cell.directory.parent, []).append(cell.directory.name)
            elif run.trouble:
                lines.append(f"{self._short(cell.directory)}: {run.trouble}")
        for directory, names in missing.items():
            lines.append(f"{self._short(directory)}: {plural(len(names), 'run')} missing ({', '.join(names)})")
        return lines

    def _short(self, directory: Path) -> str:
        return str(directory.relative_to(self._root))


def exp(value: float) -> float:
    """The exponential; infinity on overflow. With two seeds, the interval of a mean of logs can be that wide."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _read(directory: Path) -> Run | None:
    try:
        return run_reader.read([directory])[0]
    except SettingError:  # there is no run in the directory
        return None
