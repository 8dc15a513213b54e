"""Numbers that may be bounds alone, and what conditions, differences and effects that are made from them are then.

A run that did not reach its target says that it takes more than what it trained; a ladder whose last rung is usable,
that the largest usable one is this or larger. A bound decides which of the rule's answers cannot be given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from syncbn.study.claims.rules.rule import LARGEST, Reading


@dataclass(frozen=True)
class Number:
    """A number.

    Attributes:
        value: it.
        is_least: the true one is this or larger.
        is_most: the true one is this or smaller; with ``is_least`` it can be anything.
    """

    value: float
    is_least: bool = False
    is_most: bool = False


def over(reading: Reading, numbers: Sequence[Number]) -> Number:
    """Conditions as one number; not finite where what it is made from is not.

    Args:
        reading: with the conditions that the numbers are of.
        numbers: of the metric, one a condition; ``is_least`` where it did not get there.
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
        if late and reading.wants == "lower":  # what trained short of the target is not the fastest to it
            there = [number.value for number in finite if not number.is_least]
            return Number(min(there)) if there else Number(max((each.value for each in finite), default=math.nan), True)
        return Number(best((number.value for number in finite), default=math.nan), late)
    return numbers[0]


def minus(number: Number, other: Number) -> Number:
    """What is the most of the one that is taken away is the least of what is left."""
    return Number(number.value - other.value, number.is_least or other.is_most, number.is_most or other.is_least)


def of_effect(wants: str, side: Number, other: Number) -> tuple[bool, bool]:
    """Whether a side truly does this well or better, and whether it does this well or worse, as far as can be said.

    Args:
        wants: which is better, "lower" or "higher".
        side: its number.
        other: of what it is held against.
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
