"""From run directories to numbers: what a claim's rule reads for a norm and a seed, and what is not there."""

import math
from collections.abc import Sequence
from pathlib import Path

from syncbn.study import metrics, runs
from syncbn.study.claims.rule import LARGEST, Reading
from syncbn.study.comparison import Metric
from syncbn.study.plan import Cell
from syncbn.study.runs import Run
from syncbn.study.wording import plural
from syncbn.training.schema import SettingError

TARGET = "target/"  # metrics of what it took to reach an accuracy
REACHED = "target/reached"
CENSORED = ("target/steps", "target/seconds")


class Results:
    """The runs of a study, each read once.

    Attributes:
        runs: those that have left anything, by directory.
    """

    def __init__(self, cells: Sequence[Cell], root: Path) -> None:
        self._cells, self._root = list(cells), root
        self.runs = {cell.directory: run for cell in cells if (run := _read(cell.directory))}
        # A run that is done once more, as processes, has a directory of another name, and is no pair of its own.
        alone = [cell for cell in cells if cell.directory.name == str(cell.seed)]
        self._at = {(cell.part, cell.condition, cell.side, cell.seed): cell for cell in alone}
        self._metrics: dict[str, Metric] = {}

    def seeds(self, part: str) -> list[int]:
        """Of a part, in order."""
        return sorted({seed for name, _, _, seed in self._at if name == part})

    def is_planned(self, part: str, condition: str, side: str) -> bool:
        """Whether the budget has such runs."""
        return any((part, condition, side, seed) in self._at for seed in self.seeds(part))

    def run(self, part: str, condition: str, side: str, seed: int) -> Run | None:
        """One that has finished with a result that can be read; None where there is none."""
        cell = self._at.get((part, condition, side, seed))
        run = self.runs.get(cell.directory) if cell else None
        return run if run and not run.trouble else None

    def metric(self, name: str) -> Metric:
        """What it is, by its name and by the values that runs have."""
        if name not in self._metrics:
            try:
                self._metrics[name] = metrics.choose(name, [run for run in self.runs.values() if not run.trouble])
            except SettingError:  # no run has it
                self._metrics[name] = Metric(name, name.replace("/", " ").replace("_", " "), "", "lower", "")
        return self._metrics[name]

    def value(self, part: str, condition: str, side: str, seed: int, metric: str) -> float | None:
        """A metric as it is shown; None where there is no run, or none with it. May be no finite number."""
        run = self.run(part, condition, side, seed)
        return metrics.shown(self.metric(metric), run) if run and metric in run.numbers() else None

    def measured(self, reading: Reading) -> Metric:
        """What a reading is of."""
        metric = self.metric(reading.metric)
        if reading.over != LARGEST:
            return metric
        most = f"{reading.usable:g} {metric.unit}".rstrip()
        return Metric(metric.name, f"largest condition with {metric.label} of {most} at most", "", "higher", "")

    def number(self, reading: Reading, side: str, seed: int) -> float | None:
        """What the rule takes of a side for a seed; None where a run of it is missing."""
        values = []
        for condition in reading.conditions:
            value = self.value(reading.part, condition, side, seed, reading.metric)
            if value is None:
                return None
            values.append(abs(value) if reading.magnitude else value)
        return over(reading, values)

    def beyond(self, reading: Reading, side: str) -> str:
        """What must be known of the numbers of a side that are bounds alone; "" where none is."""
        found = [
            run
            for condition in reading.conditions
            for seed in self.seeds(reading.part)
            if (run := self.run(reading.part, condition, side, seed)) and reading.metric in run.numbers()
        ]
        if reading.metric in CENSORED:
            late = sum(run.number(REACHED) == 0 for run in found)
            what = reading.metric.removeprefix(TARGET)
            if late:
                return f"{side}: {late} of {len(found)} did not get there; they count with the {what} that they trained"
        if reading.over == LARGEST:
            return self._ends(reading, side)
        return ""

    def _ends(self, reading: Reading, side: str) -> str:
        """Of ``highest``: how many seeds have every condition usable, or none."""
        assert reading.usable is not None
        seeds = [seed for seed in self.seeds(reading.part) if self.number(reading, side, seed) is not None]
        ends = {"largest": 0, "none": 0}
        for seed in seeds:
            by_size = sorted(reading.conditions, key=float)
            values = [self.value(reading.part, each, side, seed, reading.metric) for each in by_size]
            usable = [value is not None and value <= reading.usable for value in values]
            ends["largest"] += usable[-1]
            ends["none"] += not any(usable)
        words = {
            "largest": "could use the largest that was tried",
            "none": "could use none, and count with the smallest",
        }
        told = [f"{count} of {len(seeds)} {words[end]}" for end, count in ends.items() if count]
        return f"{side}: {'; '.join(told)}" if told else ""

    def problems(self) -> list[str]:
        """Runs that failed, a line each, and those that are missing, a line for each cell of a part."""
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


def over(reading: Reading, values: Sequence[float]) -> float:
    """Conditions as one number; not finite where what it is made from is not.

    Args:
        reading: with the conditions that the values are of.
        values: of the metric, one a condition.
    """
    if reading.over == LARGEST:
        assert reading.usable is not None
        sizes = [float(condition) for condition in reading.conditions]
        usable = [size for size, value in zip(sizes, values, strict=True) if value <= reading.usable]
        return max(usable, default=min(sizes))  # an upper bound where none is; see Results.beyond
    if reading.over == "mean":
        return sum(values) / len(values)
    best, worst = (min, max) if reading.wants == "lower" else (max, min)
    if reading.over == "best":
        return best([value for value in values if math.isfinite(value)], default=math.nan)
    if reading.over == "worst":
        return worst(values) if all(map(math.isfinite, values)) else math.nan
    return values[0]


def exp(value: float) -> float:
    """Of a mean of logs, or an end of its interval, which may be far out where there are two seeds: then infinite."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _read(directory: Path) -> Run | None:
    try:
        return runs.read([directory])[0]
    except SettingError:  # there is nothing
        return None
