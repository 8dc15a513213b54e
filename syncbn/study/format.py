"""Numbers as a reader likes them: rounded, with a sign where the sign is the point, and a dash where there is none."""

from math import floor, isfinite, log10

MISSING = "—"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, unit: str = "") -> str:
    """Percent (and their differences, points) with two decimals, all else with four digits that count."""
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
    """The same with a sign, which zero has not."""
    text = number(value, unit)
    return f"+{text}" if isfinite(value) and value > 0 and any(digit in text for digit in "123456789") else text


def interval(low: float, high: float, unit: str = "", *, sign: bool = False) -> str:
    """From where to where; a dash if there is no such interval."""
    if not (isfinite(low) and isfinite(high)):
        return MISSING
    show = signed if sign else number
    return f"{show(low, unit)} to {show(high, unit)}"


def probability(value: float) -> str:
    """A p value with two digits that count: 0.23, 0.0016, 6.2×10⁻⁶."""
    if not isfinite(value):
        return MISSING
    if value == 0 or value >= 0.995:
        return f"{value:.0f}"
    if value >= 0.0001:
        return f"{value:.{1 - floor(log10(float(f'{value:.1e}')))}f}"
    return scientific(value)


def scientific(value: float) -> str:
    """Two digits that count, times a power of ten: 6.2×10⁻⁶."""
    if not isfinite(value):
        return MISSING
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}×{power(int(exponent))}"


def power(exponent: int) -> str:
    """Of ten: 10⁻⁶."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def seconds(value: float) -> str:
    """Milliseconds below one second."""
    if not isfinite(value):
        return MISSING
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{value * 1000:,.0f} ms" if value >= 0.0995 else f"{value * 1000:.3g} ms"


def times(value: float) -> str:
    """A ratio: 2.13×."""
    return f"{value:,.2f}×" if isfinite(value) else MISSING


def share(value: float) -> str:
    """A part of one, in percent."""
    return f"{value * 100:.1f} %" if isfinite(value) else MISSING


def count(value: float) -> str:
    """Whole numbers whole, others with one decimal."""
    if not isfinite(value):
        return MISSING
    return f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:,.1f}"


def plural(how_many: int, word: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{how_many:,} {word}{'' if how_many == 1 else 's'}"
