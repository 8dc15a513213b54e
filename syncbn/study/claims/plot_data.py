"""Computes the data of a claim's plots: means over seeds with 95 % intervals, for each side and line."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from syncbn.study.claims.readings import Results, exp
from syncbn.study.claims.result import PlotData
from syncbn.study.claims.rule import ConditionsPlot, LayersPlot, NumbersPlot, Plot
from syncbn.study.compare.paired_tests import mean_interval

COLUMNS = ["panel", "side", "series", "x", "n", "mean", "low", "high"]
# Replaces a gradient norm of 0 before its log is taken.
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


def plot(asked: Plot, results: Results) -> PlotData:
    """The data of a claim's plot. It is named after its part of the study."""
    rows = _layers(asked, results) if isinstance(asked, LayersPlot) else _metrics(asked, results)
    least, most = (0.0, None) if isinstance(asked, LayersPlot) else results.limits(*_metric_names(asked))
    return PlotData(
        name=re.sub(r"[^A-Za-z0-9]+", "-", asked.part),
        frame=pd.DataFrame(list(rows), columns=COLUMNS),
        least=least,
        most=most,
        **asked.model_dump(include={"title", "x", "y", "x_log", "y_log", "level", "level_label"}),
    )


def _metric_names(asked: ConditionsPlot | NumbersPlot) -> list[str]:
    first = f"{asked.at[0]:g}" if isinstance(asked, NumbersPlot) else ""
    return [name.replace("{x}", first) for name in asked.lines.values()]


def _metrics(asked: ConditionsPlot | NumbersPlot, results: Results) -> Iterator[dict[str, Any]]:
    """Points of one line for each side and series, over the part's conditions or over numbers in metric names."""
    at = asked.at if isinstance(asked, NumbersPlot) else _as_numbers(asked.conditions)
    for side in asked.sides:
        for series, metric in asked.lines.items():
            for place, x in enumerate(at):
                if isinstance(asked, NumbersPlot):
                    condition, name = asked.condition, metric.replace("{x}", f"{x:g}")
                else:
                    condition, name = asked.conditions[place], metric
                values = (results.value(asked.part, condition, side, seed, name) for seed in results.seeds(asked.part))
                finite = [value for value in values if value is not None and math.isfinite(value)]
                yield from _point("", side, series, x, finite)


def _as_numbers(conditions: Sequence[str]) -> Sequence[float | str]:
    """The conditions as numbers if all of them are numbers, else as they are."""
    with suppress(ValueError):
        return [float(condition) for condition in conditions]
    return conditions


def _layers(asked: LayersPlot, results: Results) -> Iterator[dict[str, Any]]:
    """Points of a panel for each condition: the gradient norm by depth at the first or last recorded step."""
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


def _point(panel: str, side: str, series: str, x: float | str, values: Sequence[float]) -> Iterator[dict[str, Any]]:
    """One point with the mean and its 95 % interval; no point if there are no values."""
    if values:
        low, high = mean_interval(values)
        mean = float(np.mean(values))
        yield dict(zip(COLUMNS, (panel, side, series, x, len(values), mean, low, high), strict=True))
