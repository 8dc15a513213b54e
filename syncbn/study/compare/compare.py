"""``compare``: reads run directories, pairs the runs, and computes the statistics."""

import math
import shlex
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from syncbn.study.compare import caveats, layers, paired_tests, reference_figures
from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.layout import Layout, lay_out
from syncbn.study.compare.pairs import Cell, Pairs, Placed, confirmations, disagreements, how_they_ran, pair, place_runs
from syncbn.study.compare.runs import run_reader
from syncbn.study.compare.runs.metric import Metric, choose, margin_of, resolution
from syncbn.study.compare.runs.settings import is_simulated
from syncbn.training.errors import SettingError

ALPHA = 0.01  # level of the test for a difference in the protocols; paired_tests.py uses it for equivalence too
EFFECTS = ["condition", "at", "side", "how", "n", "difference", "low", "high"]
EFFECTS += ["p", "p_holm", "p_wilcoxon", "p_tost", "margin", "differences", "verdict"]
MEANS = ["condition", "at", "side", "how", "n", "mean", "sd", "low", "high"]
RUNS = ["path", "side", "condition", "seed", "status", "how", "value", "seconds", "used", "why"]
COST = ["condition", "side", "how", "n", "seconds_per_step", "images_per_second"]
COST += ["pairs", "ratio", "ratio_low", "ratio_high", "collectives"]
CURVES = ["condition", "side", "how", "seed", "epoch", "metric", "value"]
CONFIRMATIONS = ["condition", "side", "seed", "one_process", "processes", "difference"]


def compare(
    paths: Sequence[Path | str],
    *,
    factor: str = "norm",
    baseline: str | None = None,
    metric: str = "test/acc",
    margin: float | None = None,
    alpha: float = ALPHA,
    title: str = "",
    question: str = "",
    expected: Sequence[Mapping[str, Any]] = (),
    sparse: bool = False,
) -> Comparison:
    """Compares runs that differ in one factor, over pairs of runs with equal other settings and equal seeds.

    Args:
        paths: run directories, sweep directories, or parent directories of these.
        factor: a setting or a group of settings. Several settings, separated by commas, form one factor.
        baseline: the side with which the others are compared. None selects "local" if it exists, else the first side.
        metric: its name in ``result.json``. An accuracy is compared as an error in percent.
        margin: the equivalence margin, half the width of "no difference". None means 0.75 points for an accuracy, and
            for other metrics 5 % of the baseline's mean in each condition.
        alpha: level of both tests: for a difference and for equivalence.
        title: of the page; "" generates one.
        question: the question that the comparison answers.
        sparse: whether a side without any run in a condition was left out on purpose, so that nothing is missing there.
        expected: published or expected figures, see :class:`syncbn.study.compare.reference_spec.Expected`.

    Raises:
        SettingError: there are no runs to compare, or the sides differ in more than the factor.
    """
    if not 0 < alpha < 1:
        raise SettingError("--alpha", alpha, f"use a number between 0 and 1, such as {ALPHA}")
    places = [Path(path) for path in paths]
    found = run_reader.read(places)
    measured = choose(metric, found)
    layout = lay_out(found, factor, baseline)
    above = run_reader.root([run.path for run in found])
    placed = place_runs(found, [run_reader.short(run.path, above) for run in found], layout, measured)
    pairs = pair(placed, layout, sparse=sparse)
    margins = _margins(pairs, layout, measured, margin)
    means, effect_rows = _means(pairs, layout), _effects(pairs, layout, measured, margins, alpha)
    cost = _cost(pairs, layout)
    layer_table = layers.layers(pairs, layout)
    confirmed, far = confirmations(pairs, margins)
    problems = caveats.unusable([p for p in placed if p.run.trouble or not math.isfinite(p.value)])
    problems += [*pairs.problems, *disagreements(placed, measured), *far]
    beside = reference_figures.beside(expected, layout, measured, means, effect_rows, cost)
    problems += [*caveats.checkpoints(pairs, layout), *caveats.versions([p.run for p in placed if p.used])]
    problems += [*caveats.few(effect_rows), *reference_figures.disagreements(beside)]
    return Comparison(
        title=title or f"{factor}: {(' against ' if len(layout.sides) == 2 else ', ').join(reversed(layout.sides))}",
        question=question,
        factor=factor,
        metric=measured,
        baseline=layout.baseline,
        sides=layout.sides,
        conditions=layout.conditions,
        axis=layout.axis,
        margin=next(iter(margins.values())) if len({*margins.values()}) == 1 else math.nan,
        alpha=alpha,
        runs=_runs(pairs),
        means=means,
        effects=effect_rows,
        curves=_curves(pairs),
        cost=cost,
        layers=layer_table,
        suggestion=layers.suggestion(layer_table, pairs, layout),
        confirmations=pd.DataFrame(confirmed, columns=CONFIRMATIONS),
        expected=beside,
        differs=caveats.differs(pairs, layout),
        constant=caveats.constant(pairs, layout),
        problems=problems,
        command=_command(places, above, factor=factor, baseline=baseline, metric=metric, margin=margin, alpha=alpha),
    )


def directory_of_report(paths: Sequence[Path]) -> Path:
    """The default directory of the report: ``compare`` in the common parent directory of the runs.

    Raises:
        SettingError: the directory is a symbolic link, and the user may not know its target.
    """
    directory = run_reader.root(run_reader.directories(paths)) / "compare"
    if directory.is_symlink():
        raise SettingError(
            "--report", directory, "this is a symbolic link; use --report with the directory it leads to"
        )
    return directory


def _axis_value(layout: Layout, condition: str) -> float:
    return float(layout.condition_rows[condition][layout.axis]) if layout.axis else math.nan


def _means(pairs: Pairs, layout: Layout) -> pd.DataFrame:
    rows = []
    for condition, place in dict.fromkeys((cell.condition, cell.place) for cell in pairs.cells):
        for side in layout.sides:
            if runs := pairs.of(Cell(condition, side, place)):
                values = [p.value for p in runs]
                low, high = paired_tests.mean_interval(values)
                sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                row = {"condition": condition, "at": _axis_value(layout, condition), "side": side}
                row |= {"how": how_they_ran(runs), "n": len(values), "mean": float(np.mean(values)), "sd": sd}
                rows.append(row | {"low": low, "high": high})
    return pd.DataFrame(rows, columns=MEANS)


def _margins(pairs: Pairs, layout: Layout, measured: Metric, asked: float | None) -> dict[str, float]:
    """The margin of each condition, from the baseline's paired runs; without any, from all runs of the condition."""
    margins = {}
    for condition in layout.conditions:
        here = [p for p in pairs.placed if p.condition == condition and math.isfinite(p.value)]
        of_baseline = [p.value for p in here if p.used and p.side == layout.baseline]
        margins[condition] = margin_of(measured, asked, of_baseline or [p.value for p in here])
    return margins


def _effects(
    pairs: Pairs, layout: Layout, measured: Metric, margins: Mapping[str, float], alpha: float
) -> pd.DataFrame:
    rows, computed = [], []
    for cell, both in pairs.cells.items():
        side, baseline = [p.value for p, _ in both], [p.value for _, p in both]
        margin = margins[cell.condition]
        one = paired_tests.effect(side, baseline, margin, resolution(measured, [*side, *baseline]))
        computed.append(one)
        row = {"condition": cell.condition, "at": _axis_value(layout, cell.condition), "side": cell.side}
        rows.append(row | {"how": how_they_ran([p for two in both for p in two]), "margin": margin} | vars(one))
    differs, same = (paired_tests.holm([getattr(one, name) for one in computed]) for name in ("p", "p_tost"))
    for row, one, p_holm, p_tost in zip(rows, computed, differs, same, strict=True):
        row |= {"p_holm": p_holm, "p_tost": p_tost, "verdict": paired_tests.decide(one, p_holm, p_tost, alpha)}
    return pd.DataFrame(rows, columns=EFFECTS)


def _runs(pairs: Pairs) -> pd.DataFrame:
    rows = [
        {
            "path": p.path,
            "side": p.side,
            "condition": p.condition,
            "seed": p.run.seed,
            "status": p.run.status,
            "how": p.how,
            "value": p.value,
            "seconds": p.run.number("seconds"),
            "used": p.used,
            "why": p.why,
        }
        for p in pairs.placed
    ]
    return pd.DataFrame(rows, columns=RUNS).astype({"seed": "Int64"})


def _curves(pairs: Pairs) -> pd.DataFrame:
    """Curves of the paired runs by epoch: training loss, and validation error (validation loss without an accuracy)."""
    frames = []
    for p in pairs.placed:
        table = p.run.metrics() if p.used else pd.DataFrame()
        if "epoch" not in table:
            continue
        chosen = {"train/loss": "train/loss", "val/acc": "val/error"}
        if "val/acc" not in table:
            chosen |= {"val/loss": "val/loss"}
        for name, called in chosen.items():
            if name not in table:
                continue
            rows = table[["epoch", name]].apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
            rows = rows.dropna().drop_duplicates("epoch", keep="last")
            values = 100 * (1 - rows[name]) if called == "val/error" else rows[name]
            about = {"condition": p.condition, "side": p.side, "how": p.how, "seed": p.seed, "metric": called}
            frames.append(pd.DataFrame({"epoch": rows["epoch"].astype(int) + 1, "value": values}).assign(**about))
    if not frames:
        return pd.DataFrame(columns=CURVES)
    return pd.concat(frames, ignore_index=True)[CURVES]


def _cost(pairs: Pairs, layout: Layout) -> pd.DataFrame:
    """The cost of each side, for runs with one process per device; in each condition the baseline is first."""
    rows = []
    by_cell: dict[tuple[str, str], dict[str, dict[int, Placed]]] = {}
    for each in pairs.placed:
        if each.is_monitored and not is_simulated(each.run):
            by_side = by_cell.setdefault((each.condition, each.place), {})
            by_side.setdefault(each.side, {})[each.seed] = each
    for (condition, _), by_side in sorted(by_cell.items(), key=lambda item: layout.conditions.index(item[0][0])):
        baseline = {seed: _seconds_per_step(p) for seed, p in by_side.get(layout.baseline, {}).items()}
        for side in layout.sides:
            runs = {seed: p for seed, p in by_side.get(side, {}).items() if math.isfinite(_seconds_per_step(p))}
            if not runs:
                continue
            ratios = [_seconds_per_step(p) / baseline[seed] for seed, p in runs.items() if seed in baseline]
            ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
            rows.append(
                {
                    "condition": condition,
                    "side": side,
                    "how": how_they_ran(list(runs.values())),
                    "n": len(runs),
                    "seconds_per_step": float(np.mean([_seconds_per_step(p) for p in runs.values()])),
                    "images_per_second": float(np.mean([p.run.number("images_per_second") for p in runs.values()])),
                    "pairs": len(ratios),
                    # The geometric mean of ratios a/b is the inverse of that of b/a; the arithmetic mean is not.
                    "ratio": float(stats.gmean(ratios)) if ratios else math.nan,
                    "ratio_low": min(ratios, default=math.nan),
                    "ratio_high": max(ratios, default=math.nan),
                    "collectives": _finite_mean([_share(p) for p in runs.values()]),
                }
            )
    return pd.DataFrame(rows, columns=COST)


def _share(placed: Placed) -> float:
    """The share of a step that collectives take; not any other figure of the user's with that name."""
    share = (placed.run.result.get("collectives") or {}).get("share")
    return float(share) if isinstance(share, int | float) else math.nan


def _seconds_per_step(placed: Placed) -> float:
    """Seconds per optimizer step, without validation and warm-up; NaN if the run did not measure its speed."""
    config, speed = placed.run.config, placed.run.number("images_per_second")
    batch = (config.get("data") or {}).get("global_batch_size")
    batches = (config.get("trainer") or {}).get("accumulate_grad_batches") or 1
    if not isinstance(batch, int) or not isinstance(batches, int) or not speed > 0:  # a run of one batch reports 0
        return math.nan
    return batch * batches / speed


def _finite_mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def _command(paths: Sequence[Path], above: Path, **options: Any) -> str:
    """The command that repeats the comparison, without options that have their default value."""
    words = ["syncbn", "compare", *sorted({run_reader.short(path, above) for path in paths})]
    for name, value in options.items():
        if value != signature(compare).parameters[name].default:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
