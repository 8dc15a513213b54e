"""Numbers as they are shown."""

from collections.abc import Callable

import pytest

from syncbn.study import wording

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("show", "arguments", "shown"),
    [
        (wording.number, (57.0, "%"), "57.00"),
        (wording.number, (-0.084, "points"), "−0.08"),
        (wording.number, (-0.001, "points"), "0.00"),
        (wording.number, (0.0,), "0.000"),
        (wording.number, (0.0123456,), "0.01235"),
        (wording.number, (12345.6,), "12,346"),
        (wording.number, (1.5e-9,), "1.50e−09"),
        (wording.number, (NAN, "%"), "—"),
        (wording.number, (INF,), "—"),
        (wording.signed, (0.3, "points"), "+0.30"),
        (wording.signed, (-57.0, "points"), "−57.00"),
        (wording.signed, (0.001, "points"), "0.00"),
        (wording.signed, (NAN,), "—"),
        (wording.interval, (1.0, 2.0, "%"), "1.00 to 2.00"),
        (wording.interval, (NAN, 2.0, "%"), "—"),
        (wording.probability, (6.2e-6,), "6.2×10⁻⁶"),
        (wording.probability, (0.00161,), "0.0016"),
        (wording.probability, (0.5,), "0.50"),
        (wording.probability, (0.0999,), "0.10"),
        (wording.probability, (1.0,), "1"),
        (wording.probability, (0.0,), "0"),
        (wording.probability, (NAN,), "—"),
        (wording.seconds, (0.0046,), "4.6 ms"),
        (wording.seconds, (0.9996,), "1,000 ms"),
        (wording.seconds, (12.345,), "12.35 s"),
        (wording.times, (2.134,), "2.13×"),
        (wording.share, (0.527,), "52.7 %"),
        (wording.count, (1024,), "1,024"),
        (wording.count, (11.4,), "11.4"),
        (wording.count, (NAN,), "—"),
        (wording.plural, (1, "run"), "1 run"),
        (wording.plural, (1200, "run"), "1,200 runs"),
    ],
)
def test_numbers_are_shown(show: Callable[..., str], arguments: tuple[float | str, ...], shown: str) -> None:
    assert show(*arguments) == shown
