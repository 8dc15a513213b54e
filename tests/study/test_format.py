"""Tests the formatting of numbers."""

from collections.abc import Callable

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
        (format.interval, (1.0, 2.0, "%"), "1.00 to 2.00"),
        (format.interval, (NAN, 2.0, "%"), "—"),
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
