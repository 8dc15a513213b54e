"""Builds the tables of the report as rounded text, for HTML and Markdown. The CSV files have all digits."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import pandas as pd

from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.paired_tests import is_within
from syncbn.study.compare.runs.metric import MARGIN_SHARE
from syncbn.study.format import MISSING, count, number, plural, probability, rounded, seconds, share, signed, times
from syncbn.study.report.ranges import difference_interval, mean_interval

FRAMES = ("runs", "means", "effects", "curves", "cost", "layers", "confirmations", "expected")
MEANS_NOTE = (
    "Over the paired runs, by Student's t. Two such intervals can overlap although the sides differ: runs are paired by"
    " seed, and the table of differences uses that."
)

TOLERANCE_NOTE = "± is a tolerance of ours"
COST_NOTE = (
    "Time relative to the baseline is the geometric mean over pairs of one seed. Under per-device statistics"
    " (norm=local, shuffle, ghost batches, groups smaller than the world) DistributedDataParallel broadcasts the"
    " running statistics from rank 0 before each forward pass. This is part of the step's time, but not of the share in"
    " collectives. norm=local_mean, and norm=sync over the world, need no such broadcast."
)


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: of the file with all digits.
        columns: heads of the columns, with units.
        numeric: whether a column contains numbers, for each column.
        rows: texts of the cells.
        tones: for each row: "better", "worse", "same", "open", "unused", or "".
        telling: head of the column that shows the tone.
    """

    name: str
    columns: list[str]
    numeric: list[bool]
    rows: list[list[str]]
    tones: list[str]
    telling: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table: its head with the unit, and the text of a row's cell."""

    head: str
    text: Callable[[Any], str]
    numeric: bool = True


def build(comparison: Comparison) -> dict[str, Table]:
    """The tables of a comparison by name, without empty ones."""
    makers = {
        "runs": _runs,
        "means": _means,
        "effects": _effects,
        "cost": _cost,
        "layers": _layers,
        "confirmations": _confirmations,
        "expected": _expected,
    }
    return {name: make(comparison) for name, make in makers.items() if len(getattr(comparison, name))}


def worded_verdict(row: pd.Series, better: str) -> tuple[str, str]:
    """The verdict of a row of effects in words, and its tone: ``lower (better)``, "better"."""
    word = str(row.verdict)
    if word in ("lower", "higher"):
        tone = "better" if word == better else "worse"
        return f"{word} ({tone})", tone
    return word, "same" if word == "no difference" else "open"


def margin_text(comparison: Comparison) -> str:
    """The equivalence margin: ``±0.75 points``."""
    unit = comparison.metric.difference_unit
    if not isfinite(comparison.margin):
        return f"±{MARGIN_SHARE:.0%} of {comparison.baseline}'s mean in the condition".replace("%", " %")
    return f"±{number(comparison.margin, unit)} {unit}".strip()


def has_tolerances(comparison: Comparison) -> bool:
    """Whether an expected figure has a tolerance."""
    return bool(comparison.expected.published.str.contains("±").any())


def with_unit(label: str, unit: str) -> str:
    """A label with its unit: ``test error (%)``."""
    return f"{label} ({unit})" if unit else label


def effects_notes(comparison: Comparison) -> list[tuple[str, str]]:
    """Explanations of the columns of the table of effects: pairs of term and meaning."""
    metric, margin = comparison.metric, margin_text(comparison)
    return [
        ("pairs", "seeds for which both sides have a finished run; both start from the same weights and data order"),
        ("difference", f"the side's {metric.label} minus that of {comparison.baseline}, mean over pairs"),
        ("95 % interval", f"of that mean, by Student's t; it ends where the {metric.label} does"),
        ("p", "paired t test, two-sided: the probability of a difference at least as large if there were none"),
        ("p, Holm", "p corrected for the number of rows (Holm 1979); the verdict uses it"),
        ("p, Wilcoxon", "signed-rank test, which does not assume a normal distribution; a check of the t test"),
        (
            "p, equivalence",
            f"two one-sided t tests (TOST), also by Holm: small if the difference is shown to be within {margin}",
        ),
        (
            "verdict",
            f"lower or higher if Holm's p is below {comparison.alpha:g}, no difference if the p of equivalence is; both"
            " can hold for a small difference. Undecided if neither is: more seeds are needed. It does not mean that"
            " there is no difference",
        ),
    ]


def _effects(comparison: Comparison) -> Table:
    metric, unit = comparison.metric, comparison.metric.difference_unit
    own_margins = [] if isfinite(comparison.margin) else [Column("margin", lambda row: number(row.margin, unit))]
    columns = [
        *_condition_and_side(comparison),
        Column("pairs", lambda row: count(row.n)),
        Column(
            with_unit(f"difference from {comparison.baseline}", unit),
            lambda row: rounded(row.difference, row.low, row.high, sign=True),
        ),
        Column("95 % interval", lambda row: difference_interval(comparison, row)),
        Column("verdict", lambda row: _verdict(comparison, row), numeric=False),
        Column("p", lambda row: probability(row.p)),
        Column("p, Holm", lambda row: probability(row.p_holm)),
        Column("p, Wilcoxon", lambda row: probability(row.p_wilcoxon)),
        Column("p, equivalence", lambda row: probability(row.p_tost)),
        *own_margins,
        *_how(comparison),
    ]
    return table("effects", comparison.effects, columns, lambda row: worded_verdict(row, metric.better)[1], "verdict")


def _verdict(comparison: Comparison, row: pd.Series) -> str:
    """The verdict, with ``by less than ±0.75 points`` if equivalence is shown too."""
    metric, unit = comparison.metric, comparison.metric.difference_unit
    words = worded_verdict(row, metric.better)[0]
    if row.verdict in ("lower", "higher") and is_within(row.p_tost, comparison.alpha):
        words += f", by less than ±{number(row.margin, unit)} {unit}".rstrip()
    return words


def _means(comparison: Comparison) -> Table:
    metric = comparison.metric
    columns = [
        *_condition_and_side(comparison),
        Column("runs", lambda row: count(row.n)),
        Column(with_unit(f"mean {metric.label}", metric.unit), lambda row: rounded(row["mean"], row.low, row.high)),
        Column("standard deviation", lambda row: rounded(row.sd, row.low, row.high)),
        Column("95 % interval of the mean", lambda row: mean_interval(comparison, row)),
        *_how(comparison),
    ]
    return table("means", comparison.means, columns)


def _cost(comparison: Comparison) -> Table:
    columns = [
        *_condition_and_side(comparison),
        Column("runs", lambda row: count(row.n)),
        Column("time per step", lambda row: seconds(row.seconds_per_step)),
        Column("images per second", lambda row: count(round(row.images_per_second, 1))),
        Column("pairs", lambda row: count(row.pairs)),
        Column(f"time relative to {comparison.baseline}", lambda row: times(row.ratio)),
        Column("least to greatest seed", lambda row: _least_to_greatest(row.ratio_low, row.ratio_high)),
        Column("share in collectives", lambda row: share(row.collectives)),
        *_how(comparison),
    ]
    return table("cost", comparison.cost, columns)


def _layers(comparison: Comparison) -> Table:
    columns = [
        _words("layer"),
        *_condition_and_side(comparison),
        Column("values on a device", lambda row: count(row.device_batch)),
        Column("worth independent samples", lambda row: count(round(row.effective_batch, 1))),
        Column("spread of the devices' means (1 is chance)", lambda row: times(row.spread)),
        Column("device's variance / shared one", lambda row: times(row.variance_ratio)),
        Column("needs sharing", lambda row: "yes" if row.needs else "no", numeric=False),
    ]
    return table("layers", comparison.layers, columns, lambda row: "worse" if row.needs else "", "needs sharing")


def _confirmations(comparison: Comparison) -> Table:
    unit, points = comparison.metric.unit, comparison.metric.difference_unit
    columns = [
        *_condition_and_side(comparison),
        Column("seed", lambda row: _label_text(row.seed)),
        Column(with_unit("in one process", unit), lambda row: number(row.one_process, unit)),
        Column(with_unit("as processes", unit), lambda row: number(row.processes, unit)),
        Column(with_unit("difference", points), lambda row: signed(row.difference, points)),
    ]
    return table("confirmations", comparison.confirmations, columns)


def _expected(comparison: Comparison) -> Table:
    tones = {"yes": "better", "no": "worse"}
    ours = f" ({TOLERANCE_NOTE})" if has_tolerances(comparison) else ""
    columns = [
        *map(_words, ("condition", "what")),
        _words(f"published or expected{ours}", "published"),
        *map(_words, ("ours", "agrees", "source")),
    ]
    return table("expected", comparison.expected, columns, lambda row: tones.get(row.agrees, "open"), "agrees")


def _runs(comparison: Comparison) -> Table:
    metric = comparison.metric
    columns = [
        _words("run", "path"),
        *_condition_and_side(comparison),
        Column("seed", lambda row: _label_text(row.seed)),
        _words("status"),
        Column(with_unit(metric.label, metric.unit), lambda row: number(row.value, metric.unit)),
        Column("training", lambda row: seconds(row.seconds)),
        *_how(comparison),
        Column("used", lambda row: "yes" if row.used else f"no: {row.why}" if row.why else "no", numeric=False),
    ]
    return table("runs", comparison.runs, columns, lambda row: "" if row.used else "unused", "used")


def ways(comparison: Comparison) -> list[str]:
    """The ways in which runs with a result ran. The first one is the main one of the report."""
    runs = comparison.runs[comparison.runs.value.notna()]
    frames = (comparison.means, comparison.effects, runs, comparison.curves, comparison.cost)
    return list(dict.fromkeys(how for frame in frames for how in frame.how))


def _condition_and_side(comparison: Comparison) -> list[Column]:
    """Columns of the condition, if there are several, and of the side."""
    return [_words(head) for head in (["condition"] if len(comparison.conditions) > 1 else []) + ["side"]]


def _how(comparison: Comparison) -> list[Column]:
    """A column of the way of running, if there are several."""
    return [_words("how")] if len(ways(comparison)) > 1 else []


def table(
    name: str,
    rows: pd.DataFrame | Iterable[Any],
    columns: Sequence[Column],
    tone: Callable[[Any], str] = lambda row: "",
    telling: str = "",
) -> Table:
    """A table of the rows of a frame, or of other objects."""
    rows = [row for _, row in rows.iterrows()] if isinstance(rows, pd.DataFrame) else list(rows)
    return Table(
        name=name,
        columns=[column.head for column in columns],
        numeric=[column.numeric for column in columns],
        rows=[[column.text(row) for column in columns] for row in rows],
        tones=[tone(row) for row in rows],
        telling=telling,
    )


def _words(head: str, name: str = "") -> Column:
    """A column of words. ``name`` is that of the frame's column if the head is another."""
    return Column(head, lambda row: _label_text(row[name or head]), numeric=False)


def _label_text(value: object) -> str:
    """The text of a label or a seed. Seeds are floats if one of them is missing."""
    if value is None or value is pd.NA or value != value:
        return MISSING
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return str(value) or MISSING


def _least_to_greatest(low: float, high: float) -> str:
    return f"{times(low)} to {times(high)}" if low == low and high == high else MISSING


def counted(comparison: Comparison) -> list[str]:
    """Lines with the number of runs of each kind."""
    runs = comparison.runs
    lines = [f"{plural(len(runs), 'run directory').replace('directorys', 'directories')}"]
    for how, of_one in runs.groupby("how", sort=False, dropna=False):
        used = int(of_one.used.sum())
        known = how if isinstance(how, str) and how else "not known how"
        lines.append(f"{known}: {plural(len(of_one), 'run')}, {used} of them in pairs")
    left_out = runs[~runs.used.astype(bool)]
    for status, of_one in left_out.groupby("status", sort=False, dropna=False):
        lines.append(f"not in a pair, {status}: {plural(len(of_one), 'run')}")
    return lines
