"""Compares published figures with the results of a claim."""

import math
from collections.abc import Sequence

from syncbn.study.claims.result import Published, Row
from syncbn.study.claims.rules.rule import Figure
from syncbn.study.claims.verdict import effect_text
from syncbn.study.format import number

NOT_MEASURED = "not measured"


def beside(figures: Sequence[Figure], rows: Sequence[Row]) -> list[Published]:
    """Each published figure with our corresponding number, and whether the two agree."""
    by_place = {(row.case, row.side): row for row in rows}
    return [_beside(figure, by_place.get((figure.case, figure.side))) for figure in figures]


def _beside(figure: Figure, row: Row | None) -> Published:
    ours, agrees = NOT_MEASURED, ""
    if row is not None and row.n:
        value, low, high = {
            "value": (row.value, row.value_low, row.value_high),
            "other": (row.other, row.other_low, row.other_high),
            "effect": (row.effect, row.low, row.high),
        }[figure.of]
        if figure.of == "effect":
            ours = effect_text(value, low, high, row.unit, row.is_ratio)
        else:
            interval = f"[{number(low, row.unit)}, {number(high, row.unit)}]" if math.isfinite(low) else ""
            ours = " ".join(filter(None, [number(value, row.unit), row.unit, interval]))
        if figure.value is not None:
            agrees = _agrees(value, low, high, figure.value, figure.tolerance)
    return Published(figure.what, figure.published, figure.source, ours, agrees)


def _agrees(value: float, low: float, high: float, published: float, tolerance: float) -> str:
    """Returns "yes" if our mean is within the tolerance, "no" if our whole interval is outside of it, else "open"."""
    tolerance += 1e-9 * abs(published)  # rounding: 2.0 has to be within 0.1 of 2.1
    if abs(value - published) <= tolerance:
        return "yes"
    return "no" if low > published + tolerance or high < published - tolerance else "open"
