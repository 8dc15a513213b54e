"""The answer in words: what differs, by how much, at what cost; and where nothing can be said."""

import math
from collections.abc import Sequence
from itertools import groupby

import pandas as pd

from syncbn.study.comparison import Metric

MINUS = "\N{MINUS SIGN}"


def verdict(
    metric: Metric, baseline: str, sides: Sequence[str], effects: pd.DataFrame, cost: pd.DataFrame, margin: float
) -> str:
    """``Comparison.verdict``: a sentence on each side, and one on what it costs."""
    sentences = []
    for side in sides[1:]:
        rows = effects[effects["side"] == side]
        if rows.empty:
            sentences.append(f"{side} could not be compared with {baseline}.")
            continue
        places = set(rows["how"])
        parts = []
        for word, group in groupby(rows.to_dict("records"), key=lambda row: row["verdict"]):
            alike = list(group)
            where = ", ".join(_where(row, len(places) > 1) for row in alike)
            where = f" at {where}" if where else ""
            if word in ("lower", "higher"):
                parts += [_difference(row, metric, len(places) > 1) for row in alike]
            elif word == "no difference":
                unit = f" {metric.difference_unit}" if metric.difference_unit else ""
                parts.append(f"no difference beyond ±{margin:.3g}{unit}{where}")
            elif word == "undecided":
                figures = ", ".join(_estimate(row, metric) for row in alike)
                parts.append(f"undecided{where} ({figures}: neither a difference nor its absence is shown)")
            else:
                parts.append(f"too few pairs to say{where}")
        sentences.append(f"{side} against {baseline}, {metric.label}: {'; '.join(parts)}.")
    return " ".join([*sentences, *_costs(baseline, sides, cost)])


def signed(value: float) -> str:
    """With a sign, to three digits; — where there is none."""
    return "—" if math.isnan(value) else f"{value:+.3g}".replace("-", MINUS)


def p_value(p: float) -> str:
    """To two digits; — where there is none."""
    if math.isnan(p):
        return "—"
    return "<1e-6" if p < 1e-6 else f"{p:.2g}"


def _where(row: dict[str, object], with_how: bool) -> str:
    return " as ".join(part for part in (str(row["condition"]), str(row["how"]) if with_how else "") if part)


def _estimate(row: dict[str, object], metric: Metric) -> str:
    low, middle, high = (signed(float(str(row[name]))) for name in ("low", "difference", "high"))
    return f"{middle} [{low}, {high}]{f' {metric.difference_unit}' if metric.difference_unit else ''}"


def _difference(row: dict[str, object], metric: Metric, with_how: bool) -> str:
    low, high = sorted((abs(float(str(row["low"]))), abs(float(str(row["high"])))))
    amount = f"{abs(float(str(row['difference']))):.3g}"
    unit = f" {metric.difference_unit}" if metric.difference_unit else ""
    good = "better" if row["verdict"] == metric.better else "worse"
    where = _where(row, with_how)
    figures = f"95 % interval {low:.3g} to {high:.3g}, p {p_value(float(str(row['p_holm'])))} after Holm"
    return f"{row['verdict']} by {amount}{unit}, which is {good}{f', at {where}' if where else ''} ({figures})"


def _costs(baseline: str, sides: Sequence[str], cost: pd.DataFrame) -> list[str]:
    """A sentence on the time of a step."""
    known = cost[cost["side"].isin(sides[1:]) & cost["ratio"].notna()]
    if known.empty:
        return ["What it costs cannot be said: no such runs had a process for each device."] if cost.empty else []
    said = []
    for side in [side for side in sides[1:] if side in set(known["side"])]:
        ratios = known[known["side"] == side]["ratio"]
        least, most = f"{ratios.min():.2f}", f"{ratios.max():.2f}"
        said.append(f"{side} takes {least if least == most else f'{least} to {most}'} times as long")
    return [f"A step with {'; with '.join(said)} as with {baseline}."]
