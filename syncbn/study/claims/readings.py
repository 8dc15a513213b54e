"""Reads the metric of each norm and seed from the run directories, and reports missing ones.

A number may be censored, that is a lower or upper bound. A run that did not reach its target in time shows only a lower
bound: the steps or seconds that it trained. If the largest tried condition is usable, the largest usable condition is
this one or a larger one. Bounds decide which answers of the rule cannot be given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from syncbn.study.cells import Cell
from syncbn.study.claims.rule import LARGEST, Reading
from syncbn.study.compare.runs import run_reader
from syncbn.study.compare.runs.metric import Metric, choose, shown
from syncbn.study.compare.runs.run_reader import Run
from syncbn.study.format import plural
from syncbn.training.errors import SettingError

TARGET = "target/"  # prefix of metrics on reaching a target accuracy
REACHED = "target/reached"
CENSORED = ("target/steps", "target/seconds")
NOT_NEGATIVE = ("target/steps", "target/seconds", "images_per_second", "test/loss", "fit/loss")
FEW = 3  # names of runs in a line


@dataclass(frozen=True)
class Number:
    """A number that may be a bound.

    Attributes:
        value: the number.
        is_least: whether it is a lower bound: the true value is this or larger.
        is_most: whether it is an upper bound: the true value is this or smaller. With both, the true value is unknown.
    """

    value: float
    is_least: bool = False
    is_most: bool = False


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

    def limits(self, *names: str) -> tuple[float | None, float | None]:
        """The smallest and the largest value that metrics with these names can have; None for no limit."""
        if all(self.metric(name).unit == "%" for name in names):
            return 0.0, 100.0
        return 0.0 if all(name in NOT_NEGATIVE for name in names) else None, None

    def limits_of_reading(self, reading: Reading) -> tuple[float | None, float | None]:
        """The limits of the number that a reading results in."""
        if reading.over == LARGEST or reading.magnitude:
            return 0.0, None
        least, most = self.limits(reading.metric)
        if reading.less:
            return None if most is None else -most, most
        return least, most

    def number(self, reading: Reading, side: str, seed: int) -> Number | None:
        """The number of a side and seed by the reading; None if one of its runs is missing."""
        seen = {each: self._run_number(reading, each, side, seed) for each in reading.asked}
        there = {each: number for each, number in seen.items() if number is not None}
        if len(there) < len(seen):
            return None
        number = over(reading, [there[each] for each in reading.conditions])
        return minus(number, there[reading.less]) if reading.less else number

    def notes_on_bounds(self, *read: tuple[Reading, str]) -> list[str]:
        """Notes on the numbers of readings and sides that are bounds or omit conditions; "" for none."""
        return list(dict.fromkeys(self._note_on_bounds(reading, side) for reading, side in read))

    def _note_on_bounds(self, reading: Reading, side: str) -> str:
        numbers = [self.number(reading, side, seed) for seed in self.seeds(reading.part)]
        found = [number for number in numbers if number is not None]
        if reading.over == LARGEST:
            told = [
                (sum(number.is_least for number in found), "could use the largest value tried"),
                (sum(number.is_most for number in found), "could use no value and count with the smallest"),
            ]
            words = "; ".join(f"{count} of {plural(len(found), 'seed')} {what}" for count, what in told if count)
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
        words = f"{late} of {plural(len(seen), 'run')} missed the target"
        if reading.over != "best" or reading.wants != "lower":
            return f"{words} and count with the {what} they trained"
        words += "; the best run that reached it counts"
        nowhere = sum(number.is_least for number in found)
        of_all = f", and for {nowhere} of {plural(len(found), 'seed')} without one the most {what} trained"
        return words + (of_all if nowhere else "")

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
        """One line for each reason why runs failed, and one for each part, condition and side with missing runs."""
        lines, missing, failed = [], dict[Path, list[str]](), dict[str, list[str]]()
        for cell in self._cells:
            run = self.runs.get(cell.directory)
            if run is None:
                missing.setdefault(cell.directory.parent, []).append(cell.directory.name)
            elif run.trouble:
                failed.setdefault(run.trouble, []).append(str(cell.directory.relative_to(self._root)))
        for trouble, names in failed.items():
            few = ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
            lines.append(f"{few}: {trouble}" if len(names) == 1 else f"{len(names)} runs: {trouble} ({few})")
        for directory, names in missing.items():
            where = directory.relative_to(self._root)
            lines.append(f"{where}: {plural(len(names), 'run')} missing ({', '.join(names)})")
        return lines


def over(reading: Reading, numbers: Sequence[Number]) -> Number:
    """Reduces the numbers of all conditions to one. Non-finite numbers can make the result non-finite.

    ``numbers`` has one for each condition of the reading. ``is_least`` marks runs that did not reach the target.
    """
    values, late = [number.value for number in numbers], any(number.is_least for number in numbers)
    if reading.over == LARGEST:
        return _highest(reading, numbers)
    if reading.over == "mean":
        return Number(sum(values) / len(values), late)
    best, worst = (min, max) if reading.wants == "lower" else (max, min)
    if reading.over == "worst":
        return Number(worst(values) if all(map(math.isfinite, values)) else math.nan, late)
    if reading.over == "best":
        finite = [number for number in numbers if math.isfinite(number.value)]
        # A run that missed the target is not the fastest, even if it trained for fewer steps.
        if late and reading.wants == "lower":
            there = [number.value for number in finite if not number.is_least]
            return Number(min(there)) if there else Number(max((each.value for each in finite), default=math.nan), True)
        return Number(best((number.value for number in finite), default=math.nan), late)
    return numbers[0]


def minus(number: Number, other: Number) -> Number:
    """The difference. An upper bound of the subtracted number makes the difference a lower bound, and vice versa."""
    return Number(number.value - other.value, number.is_least or other.is_most, number.is_most or other.is_least)


def of_effect(wants: str, side: Number, other: Number) -> tuple[bool, bool]:
    """Whether the improvement of a side over another is a lower bound, and whether it is an upper bound."""
    by = minus(side, other)
    return (by.is_most, by.is_least) if wants == "lower" else (by.is_least, by.is_most)


def _highest(reading: Reading, numbers: Sequence[Number]) -> Number:
    assert reading.usable is not None
    sizes = [float(condition) for condition in reading.conditions]
    usable = [
        size
        for size, number in zip(sizes, numbers, strict=True)
        if number.value <= reading.usable and not number.is_least
    ]
    if not usable:
        return Number(min(sizes), is_most=True)
    return Number(max(usable), is_least=max(usable) == max(sizes))


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
