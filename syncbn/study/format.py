"""Formats numbers for reports: rounding, signs, units, and a dash for missing numbers."""

from collections.abc import Sequence
from math import floor, isfinite, log10

MISSING = "—"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, unit: str = "") -> str:
    """Percent and points with two decimals, other numbers with four significant digits."""
    if not isfinite(value):
        return MISSING
    if unit in ("%", "points"):
        text = f"{value:,.2f}"
    else:
        decimals = 3 - floor(log10(abs(value))) if value else 3
        text = f"{value:.2e}" if decimals > 7 else f"{value:,.{max(decimals, 0)}f}"
    if not any(digit in text for digit in "123456789"):  # -0.00
        text = text.lstrip("-")
    return text.replace("-", "−")


def signed(value: float, unit: str = "") -> str:
    """Like :func:`number`, with a sign; zero has none."""
    text = number(value, unit)
    return f"+{text}" if isfinite(value) and value > 0 and any(digit in text for digit in "123456789") else text


def rounded(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """A number with as many decimals as its interval supports.

    Half the width of the interval has two significant digits: 1.8979 with 1.47 to 2.44 is ``1.90``, and 4310.7 with
    4029.9 to 4591.5 is ``4,310``. Ends are shown with ``rounded(low, low, high)``, and so have the same decimals.

    Args:
        value: the number.
        low, high: ends of the interval. If one is not finite, or both are equal, the number has at most three
            significant digits.
        sign: whether a positive number has a ``+``.

    Returns:
        The text; a dash if the number is not finite.
    """
    if not isfinite(value):
        return MISSING
    half = (high - low) / 2
    has_width = isfinite(half) and half > 0
    decimals = _decimals(half, 2) if has_width else _decimals(value, 3)
    if decimals > 7 or abs(value) >= 1e6:
        text = scientific(value)
    else:
        text = f"{round(value, decimals):,.{max(decimals, 0)}f}"
        if not has_width and "." in text:
            text = text.rstrip("0").rstrip(".")
    if not any(digit in text for digit in "123456789"):
        if value == 0 or not (low > 0 or high < 0):
            return text.lstrip("-")
        text = scientific(value)  # an interval without 0 does not show a 0
    text = text.replace("-", "−")
    return f"+{text}" if sign and value > 0 else text


def _decimals(value: float, digits: int) -> int:
    """The decimals with which a number has so many significant digits; negative to round to tens or hundreds."""
    return digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2])


def rounded_interval(
    low: float, high: float, *, sign: bool = False, of: tuple[float, float] | None = None, between: str = " to "
) -> str:
    """An interval with the decimals of :func:`rounded`, ``1.47 to 2.44``; a dash if an end is not finite.

    ``of`` is the whole interval, which decides the decimals, if this one is cut.
    """
    if not (isfinite(low) and isfinite(high)):
        return MISSING
    return between.join(rounded(end, *(of or (low, high)), sign=sign) for end in (low, high))


def cut(low: float, high: float, least: float, greatest: float) -> tuple[float, float]:
    """The part of an interval that lies in a range; an end that is not finite stays."""
    return max(low, least) if isfinite(low) else low, min(high, greatest) if isfinite(high) else high


def probability(value: float) -> str:
    """A p value with two significant digits: 0.23, 0.0016, 6.2×10⁻⁶."""
    if not isfinite(value):
        return MISSING
    if value == 0 or value >= 0.995:
        return f"{value:.0f}"
    if value >= 0.0001:
        return f"{value:.{1 - floor(log10(float(f'{value:.1e}')))}f}"
    return scientific(value)


def scientific(value: float) -> str:
    """Scientific notation with two significant digits: 6.2×10⁻⁶."""
    if not isfinite(value):
        return MISSING
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}×{power(int(exponent))}"


def power(exponent: int) -> str:
    """A power of ten: 10⁻⁶."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def seconds(value: float) -> str:
    """A duration: seconds, or milliseconds below one second."""
    if not isfinite(value):
        return MISSING
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1000:,.0f} ms" if value >= 0.0995 else f"{value * 1000:.3g} ms"


def times(value: float) -> str:
    """A ratio: 2.13×."""
    return f"{value:,.2f}×" if isfinite(value) else MISSING


def share(value: float) -> str:
    """A fraction in percent."""
    return f"{value * 100:.1f} %" if isfinite(value) else MISSING


def count(value: float) -> str:
    """A count: integers without decimals, others with one decimal."""
    if not isfinite(value):
        return MISSING
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:,.1f}"


def span(least: str, most: str) -> str:
    """A range: ``1 to 3``, or ``1`` if both ends are the same."""
    return least if least == most else f"{least} to {most}"


def plural(how_many: int, word: str) -> str:
    """A number with its noun: ``1 run``, ``2 runs``."""
    return f"{how_many:,} {word}{'' if how_many == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """``2``, ``2 and 4``, ``2, 4 and 8``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
