"""Pairs runs that differ only in the factor and have the same seed, and reports the runs without a partner."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from syncbn.study.compare.layout import Layout
from syncbn.study.compare.runs import labels
from syncbn.study.compare.runs.metric import Metric, resolution, shown
from syncbn.study.compare.runs.run_reader import Run
from syncbn.study.compare.runs.settings import how, is_simulated, place
from syncbn.training.errors import SettingError

CONFIRMS = "it confirms the run in one process"


@dataclass
class Placed:
    """A run and its position in the comparison. ``path`` is for display; other fields are as in ``Comparison.runs``."""

    run: Run
    path: str
    side: str
    condition: str
    place: str
    value: float
    used: bool = False
    why: str = ""
    newer: "Placed | None" = None  # the run that repeats it
    how: str = ""

    @property
    def usable(self) -> bool:
        """Whether the run has a value and no newer run repeats it."""
        return not self.why

    @property
    def is_monitored(self) -> bool:
        """Whether its cost and layers count. A run that confirms a one-process run is in no pair, but is monitored."""
        return self.used or self.why == CONFIRMS

    @property
    def seed(self) -> int:
        """The seed; -1 if the settings are unreadable."""
        return self.run.seed if self.run.seed is not None else -1


class Cell(NamedTuple):
    """The condition, side and place that a list of pairs belongs to."""

    condition: str
    side: str
    place: str


@dataclass
class Pairs:
    """The pairs of a comparison.

    Attributes:
        placed: every run.
        cells: pairs of a side and the baseline, in the order of seeds: ``{cell: [(side, baseline), ...]}``. No list is
            empty.
        confirmed: runs in one process, each with the same run as processes.
        problems: one line for each missing partner.
    """

    placed: list[Placed]
    cells: dict[Cell, list[tuple[Placed, Placed]]] = field(default_factory=dict)
    confirmed: list[tuple[Placed, Placed]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def of(self, cell: Cell) -> list[Placed]:
        """The paired runs of a side. For the baseline: its runs in any pair of the condition and place."""
        mine = [each for each in self.placed if (each.condition, each.side, each.place) == cell and each.used]
        return sorted(mine, key=lambda each: each.seed)


def how_they_ran(placed: Sequence[Placed]) -> str:
    """How runs of one place ran; without the number of devices if that varies."""
    ran = {each.how for each in placed}
    return ran.pop() if len(ran) == 1 else placed[0].place


def place_runs(runs: Sequence[Run], paths: Sequence[str], layout: Layout, metric: Metric) -> list[Placed]:
    """Every run with its side, its condition, its value, and the reason if it is unusable."""
    placed = []
    for run, path, side, condition in zip(runs, paths, layout.side_of, layout.condition_of, strict=True):
        value = shown(metric, run)
        why = run.trouble
        if not why and not math.isfinite(value):
            given = metric.name in run.numbers()
            why = f"{metric.name} is {run.number(metric.name)}" if given else f"it has no {metric.name}"
        if not why and run.seed is None:
            why = "its settings name no seed"
        placed.append(Placed(run, path, side, condition, place(run), value, why=why))
    _set_aside_repetitions(placed)
    _name_ways(placed)
    return placed


def _name_ways(placed: Sequence[Placed]) -> None:
    """Sets ``how`` of each run: with numbers, unless the number of devices follows the condition."""
    numbers: dict[str, dict[str, set[str]]] = {}
    for each in placed:
        numbers.setdefault(each.place, {}).setdefault(each.condition, set()).add(how(each.run))
    follows = {place for place, by_condition in numbers.items() if len(set(map(frozenset, by_condition.values()))) > 1}
    for each in placed:
        each.how = each.place if each.place in follows else how(each.run)


def pair(placed: list[Placed], layout: Layout, *, sparse: bool = False) -> Pairs:
    """Pairs every side with the baseline, within each condition and place.

    With ``sparse`` a side that has no run in a condition is not missing there.

    Some seeds of a condition may have run both in one process and as processes. The latter only confirm the former:
    as an effect they would count the same pairs twice. They are an effect if there are more of them.

    Raises:
        SettingError: there is no pair. The hint contains the reason and a fix.
    """
    pairs = Pairs(placed)
    usable = [p for p in placed if p.usable]
    table = {(p.condition, p.side, p.place, p.seed): p for p in usable}
    pairs.confirmed = _confirmed(table)
    confirming = {id(processes) for _, processes in pairs.confirmed}
    places = sorted({p.place for p in usable}, key=lambda name: (not name.startswith("processes"), name))
    seeds = sorted({p.seed for p in usable})
    for condition in layout.conditions:
        for side in layout.sides[1:]:
            by_place = {}
            for where in places:
                found = [[table.get((condition, s, where, n)) for s in (side, layout.baseline)] for n in seeds]
                by_place[where] = [(one, other) for one, other in found if one and other]
            in_one = [len(both) for both in by_place.values() if both and is_simulated(both[0][0].run)]
            most = max(in_one, default=0)
            for where, both in by_place.items():
                confirms = all(id(p) in confirming for two in both for p in two) and len(both) <= most
                if both and not confirms:
                    pairs.cells[Cell(condition, side, where)] = both
    for each in (p for both in pairs.cells.values() for two in both for p in two):
        each.used = True
    factor = ",".join(layout.factor)
    reasons = [
        _reason_side_is_unpaired(placed, layout, side) for side in layout.sides[1:] if not _is_paired(pairs, side)
    ]
    if not pairs.cells:
        raise SettingError("--factor", factor, reasons[0])
    unpaired = [f"--factor={factor}: {reason}" for reason in reasons]
    pairs.problems = [*unpaired, *_missing(pairs, layout, confirming, sparse)]
    for each in usable:
        if not each.used:
            each.why = CONFIRMS if id(each) in confirming else _reason_run_is_unpaired(each, layout)
    return pairs


def _set_aside_repetitions(placed: Iterable[Placed]) -> None:
    """Marks all but the newest of the runs with the same settings and seed as repetitions."""
    newest: dict[tuple[str, str, str, int], Placed] = {}
    for each in sorted((p for p in placed if p.usable), key=lambda p: (p.run.ended, p.path), reverse=True):
        first = newest.setdefault((each.condition, each.side, each.place, each.seed), each)
        if first is not each:
            each.why, each.newer = f"repeated: {first.path} is newer", first


def _confirmed(table: dict[tuple[str, str, str, int], Placed]) -> list[tuple[Placed, Placed]]:
    """Runs in one process, each with the run as processes that has the same settings and seed."""
    by_setting: dict[tuple[str, str, int], list[Placed]] = {}
    for (condition, side, _, seed), each in table.items():
        by_setting.setdefault((condition, side, seed), []).append(each)
    return [
        (one, other)
        for runs in by_setting.values()
        for one, other in product(runs, runs)
        if is_simulated(one.run) and not is_simulated(other.run)
    ]


def _is_paired(pairs: Pairs, side: str) -> bool:
    return any(cell.side == side for cell in pairs.cells)


def _missing(pairs: Pairs, layout: Layout, confirming: set[int], sparse: bool) -> list[str]:
    """Lines on missing runs, one for all conditions in which a side lacks the same seeds."""
    missing: dict[tuple[str, str], list[str]] = {}
    usable = [p for p in pairs.placed if p.usable]
    several = len({p.place for p in usable}) > 1
    there_at_all = {(p.condition, p.side) for p in pairs.placed}
    for condition in layout.conditions:
        for where in sorted({p.place for p in usable if p.condition == condition}):
            here = [p for p in usable if (p.condition, p.place) == (condition, where)]
            here = [p for p in here if id(p) not in confirming or p.used]
            seeds = {side: {p.seed for p in here if p.side == side} for side in layout.sides}
            every = set().union(*seeds.values())
            for side, there in seeds.items():
                if not _is_paired(pairs, side) and side != layout.baseline:
                    continue  # _reason_side_is_unpaired reports this side
                if sparse and (condition, side) not in there_at_all:
                    continue
                if every - there:
                    lacks = f"with {_listed_seeds(every - there)}{f' ({where})' * several}"
                    missing.setdefault((f"{side} has no finished run", lacks), []).append(condition)
        if not any(p.condition == condition for p in usable):
            missing.setdefault(("nothing has finished", ""), []).append(condition)
    lines = [(what, f"at {labels.at(where)}" if any(where) else "", lacks) for (what, lacks), where in missing.items()]
    return [" ".join(filter(None, words)) for words in lines]


def _reason_run_is_unpaired(each: Placed, layout: Layout) -> str:
    others = [layout.baseline] if each.side != layout.baseline else layout.sides[1:]
    other = others[0] if len(others) == 1 else "another side"
    return f"no partner: there is no run of {other} in its settings with seed {each.seed} ({each.place})"


def _reason_side_is_unpaired(placed: Sequence[Placed], layout: Layout, side: str) -> str:
    """The reason why a side has no pair with the baseline, with a fix, as one line."""
    baseline, factor = layout.baseline, ",".join(layout.factor)
    ours = [p for p in placed if p.usable and p.side == side]
    theirs = [p for p in placed if p.usable and p.side == baseline]
    if not ours or not theirs:
        name = side if not ours else baseline
        return f"no run of {name} has finished with a result, so {side} has no pair with {baseline}"
    rows = layout.condition_rows
    closest = min(
        ((p, q) for p in ours for q in theirs),
        key=lambda two: len(labels.varying([rows[two[0].condition], rows[two[1].condition]])),
    )
    one, other = (rows[p.condition] for p in closest)
    names = labels.varying([one, other])
    if names:
        values = ", ".join(f"{n}={labels.text(other.get(n))} against {labels.text(one.get(n))}" for n in names[:6])
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        both = f", or --factor={','.join([factor, *names])} compares all of it at once" if len(names) < 3 else ""
        return (
            f"{baseline} and {side} differ in more than {factor}, so no runs of theirs are a pair: {values}{more}; run "
            f"both with the same{both}"
        )
    common = {p.place for p in ours} & {p.place for p in theirs}
    if not common:
        return (
            f"{baseline} ran as {closest[1].place}, {side} as {closest[0].place}, and such runs are no pairs; run both "
            "the same way"
        )
    return (
        f"{baseline} and {side} have no seed in common: {_listed_seeds({p.seed for p in theirs})} against "
        f"{_listed_seeds({p.seed for p in ours})}; run both with the same seeds"
    )


def _listed_seeds(seeds: Iterable[int]) -> str:
    """``seed 3``, ``seeds 0, 1, 2``."""
    ordered = sorted(seeds)
    shown = ", ".join(map(str, ordered[:12])) + (f" and {len(ordered) - 12} more" if len(ordered) > 12 else "")
    return f"seed{'s' * (len(ordered) != 1)} {shown}"


def confirmations(pairs: Pairs, margins: Mapping[str, float]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of ``Comparison.confirmations``, and a line on the differences that exceed their condition's margin."""
    rows: list[dict[str, Any]] = []
    for one, several in pairs.confirmed:
        row = {"condition": one.condition, "side": one.side, "seed": one.seed, "one_process": one.value}
        rows.append({**row, "processes": several.value, "difference": several.value - one.value})
    far = [row for row in rows if abs(row["difference"]) > margins[row["condition"]]]
    if not far:
        return rows, []
    most = max(far, key=lambda row: abs(row["difference"]))
    where = " at ".join(filter(None, (most["side"], most["condition"])))
    values = f"{most['one_process']:.4g} and {most['processes']:.4g}"
    return rows, [
        f"{len(far)} of {len(rows)} runs in one process differ by more than the margin from the same run with a "
        f"process for each device; most: {where} with seed {most['seed']}, {values}"
    ]


def disagreements(placed: Sequence[Placed], metric: Metric) -> list[str]:
    """Lines on repeated runs whose values differ, or that test different checkpoints."""
    lines = []
    for each in placed:
        if newer := each.newer:
            both, tests = f"{each.path} and {newer.path}", [p.run.about.get("tests") for p in (each, newer)]
            if tests[0] != tests[1]:
                lines.append(
                    f"{both} have the same settings and seed, but test different checkpoints ({tests[0]}, {tests[1]}); "
                    "the newer alone counts"
                )
            elif abs(each.value - newer.value) > resolution(metric, [newer.value]):
                lines.append(f"{both} are the same run twice and differ: {each.value:.4g}, {newer.value:.4g}")
    return lines
