"""Tests the formatting of numbers."""

from collections.abc import Callable
from functools import partial

import pytest

from syncbn.study import format

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("show", "arguments", "shown"),
    [
        (format.number, (57.0, "%"), "57.00"),
        (format.number, (-0.084, "points"), "−0.08"),
        (format.number, (-0.001, "points"), "0.00"),
        (format.number, (0.0,), "0.000"),
        (format.number, (0.0123456,), "0.01235"),
        (format.number, (12345.6,), "12,346"),
        (format.number, (1.5e-9,), "1.50e−09"),
        (format.number, (NAN, "%"), "—"),
        (format.number, (INF,), "—"),
        (format.signed, (0.3, "points"), "+0.30"),
        (format.signed, (-57.0, "points"), "−57.00"),
        (format.signed, (0.001, "points"), "0.00"),
        (format.signed, (NAN,), "—"),
        (partial(format.rounded_interval, of=(0.5, 2.6)), (1.0, 2.0), "1.0 to 2.0"),
        (partial(format.rounded_interval, between=", "), (1.0, 2.0), "1.00, 2.00"),
        (format.rounded_interval, (NAN, 2.0), "—"),
        (format.rounded, (1.8979, 1.4733, 2.4449), "1.90"),
        (format.rounded, (4310.7, 4029.9, 4591.5), "4,310"),
        (format.rounded, (0.020951, 0.01579, 0.026112), "0.0210"),
        (format.rounded, (-13.068, -17.01, -9.13), "−13.1"),
        (format.rounded, (28.756, 17.58, 39.93), "29"),
        (format.rounded, (5.0, 4.9004, 5.0996), "5.00"),  # half of the width is 0.10 when rounded
        (format.rounded, (-0.0004, -0.1, 0.1), "0.00"),
        (format.rounded, (0.3, 0.3, 0.3), "0.3"),
        (format.rounded, (90.1431, 90.1431, 90.1431), "90.1"),
        (format.rounded, (12345.6, NAN, NAN), "12,300"),
        (format.rounded, (10.0, NAN, NAN), "10"),
        (format.rounded, (100.0, 70.0, 130.0), "100"),
        (format.rounded, (0.5, 0.1, INF), "0.5"),
        (format.rounded, (0.0, NAN, NAN), "0"),
        (format.rounded, (3.4e30, 2.1e29, 5.0e31), "3.4×10³⁰"),
        (format.rounded, (-3.4e-9, -4e-9, -2.8e-9), "−3.4×10⁻⁹"),
        (format.rounded, (3.4e-7, 1e-8, 0.002), "3.4×10⁻⁷"),
        (format.rounded, (NAN, 1.0, 2.0), "—"),
        (partial(format.rounded, sign=True), (12.97, 8.9, 17.0), "+13.0"),
        (partial(format.rounded, sign=True), (-12.97, -17.0, -8.9), "−13.0"),
        (partial(format.rounded, sign=True), (0.0004, -0.1, 0.1), "0.00"),
        (format.rounded_interval, (1.4733, 2.4449), "1.47 to 2.44"),
        (partial(format.rounded_interval, sign=True), (-0.0886, 1.196), "−0.09 to +1.20"),
        (format.rounded_interval, (1.0, INF), "—"),
        (format.probability, (6.2e-6,), "6.2×10⁻⁶"),
        (format.probability, (0.00161,), "0.0016"),
        (format.probability, (0.5,), "0.50"),
        (format.probability, (0.0999,), "0.10"),
        (format.probability, (1.0,), "1"),
        (format.probability, (0.0,), "0"),
        (format.probability, (NAN,), "—"),
        (format.seconds, (0.0046,), "4.6 ms"),
        (format.seconds, (0.9996,), "1,000 ms"),
        (format.seconds, (12.345,), "12.35 s"),
        (format.times, (2.134,), "2.13×"),
        (format.share, (0.527,), "52.7 %"),
        (format.count, (1024,), "1,024"),
        (format.count, (11.4,), "11.4"),
        (format.count, (NAN,), "—"),
        (format.plural, (1, "run"), "1 run"),
        (format.plural, (1200, "run"), "1,200 runs"),
    ],
)
def test_numbers_are_shown(show: Callable[..., str], arguments: tuple[float | str, ...], shown: str) -> None:
    assert show(*arguments) == shown
