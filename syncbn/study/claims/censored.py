"""Censored numbers: values that may be lower or upper bounds, and their reductions, differences and effects.

A run that did not reach its target in time shows only a lower bound: the steps or seconds that it trained. If the
largest tried condition is usable, the largest usable condition is this one or a larger one. Bounds decide which answers
of the rule cannot be given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from syncbn.study.claims.rules.rule import LARGEST, Reading


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


def over(reading: Reading, numbers: Sequence[Number]) -> Number:
    """Reduces the numbers of all conditions to one. Non-finite numbers can make the result non-finite.

    Args:
        reading: with the conditions and the reduction.
        numbers: values of the metric, one for each condition. ``is_least`` marks runs that did not reach the target.
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
    """Whether the improvement of a side is a lower bound, and whether it is an upper bound.

    Args:
        wants: which values are better, "lower" or "higher".
        side: number of the side.
        other: number of the side it is compared with.
    """
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
