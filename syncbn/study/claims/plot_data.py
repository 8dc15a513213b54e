"""The numbers of a claim's plots: means over seeds with 95 % intervals, for each side and line."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from syncbn.study.claims.readings import Results, exp
from syncbn.study.claims.result import PlotData
from syncbn.study.claims.rule_plots import Plot
from syncbn.study.compare.paired_tests import mean_interval

COLUMNS = ["panel", "side", "series", "x", "n", "mean", "low", "high"]
# What a gradient that has vanished counts as, where a mean is of logs.
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


def plots(asked: Sequence[Plot], results: Results) -> list[PlotData]:
    """The plots of a claim, in order, named by the parts that they are of."""
    return [_plot(each, results) for each in asked]


def _plot(asked: Plot, results: Results) -> PlotData:
    rows = {"conditions": _conditions, "numbers": _numbers, "layers": _layers}[asked.kind](asked, results)
    return PlotData(
        name=re.sub(r"[^A-Za-z0-9]+", "-", asked.part),
        title=asked.title,
        x=asked.x,
        y=asked.y,
        x_log=asked.x_log,
        y_log=asked.y_log,
        frame=pd.DataFrame(list(rows), columns=COLUMNS),
        level=asked.level,
        level_label=asked.level_label,
    )


def _conditions(asked: Plot, results: Results) -> Iterator[dict[str, Any]]:
    """A line for each side and series over the part's conditions."""
    at: list[float | str] = list(asked.conditions)
    with suppress(ValueError):
        at = [float(condition) for condition in asked.conditions]
    for side in asked.sides:
        for series, metric in asked.series.items():
            for condition, x in zip(asked.conditions, at, strict=True):
                values = _over_seeds(asked, results, condition, side, metric)
                yield from _point("", side, series, x, values)


def _numbers(asked: Plot, results: Results) -> Iterator[dict[str, Any]]:
    """A line for each side and series over numbers that are in the metrics' names."""
    for side in asked.sides:
        for series, metric in asked.series.items():
            for x in asked.at:
                values = _over_seeds(asked, results, asked.conditions[0], side, metric.replace("{x}", f"{x:g}"))
                yield from _point("", side, series, x, values)


def _layers(asked: Plot, results: Results) -> Iterator[dict[str, Any]]:
    """A panel for each condition: the gradient's norm by depth, the first or last time that the monitor looked."""
    for condition in asked.conditions:
        for side in asked.sides:
            tables = [
                run.gradients()
                for seed in results.seeds(asked.part)
                if (run := results.run(asked.part, condition, side, seed))
            ]
            of = "min" if asked.look == "first" else "max"
            looks = [table[table["step"] == table["step"].agg(of)] for table in tables if not table.empty]
            for depth, norms in pd.concat(looks).groupby("depth")["norm"] if looks else ():
                logs = np.log(np.maximum(norms[np.isfinite(norms)].to_numpy(dtype=float), SMALLEST)).tolist()
                for row in _point(condition, side, "", float(depth), logs):
                    yield row | {key: exp(row[key]) for key in ("mean", "low", "high")}


def _over_seeds(asked: Plot, results: Results, condition: str, side: str, metric: str) -> list[float]:
    """The metric of each seed that has one which is a finite number."""
    values = [results.value(asked.part, condition, side, seed, metric) for seed in results.seeds(asked.part)]
    return [value for value in values if value is not None and math.isfinite(value)]


def _point(panel: str, side: str, series: str, x: float | str, values: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Nothing where there are no values."""
    if values:
        low, high = mean_interval(values)
        mean = float(np.mean(values))
        yield dict(zip(COLUMNS, (panel, side, series, x, len(values), mean, low, high), strict=True))
