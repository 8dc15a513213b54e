"""Makes rows of the table of results from the metrics that a test has logged, whatever their names."""

from collections.abc import Iterable, Mapping
from typing import Any

REPEATED = ("precise", "fit")  # the parts of result.json that repeat the test; they have rows for their accuracy


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row for each metric of the test but accuracy, count and loss of a Classifier, which have rows in words.

    A module that logs no accuracy has rows for the metrics of the repeated tests too.
    """
    test = result.get("test") or {}
    worded = {"test/acc", "test/loss"} | ({"test/count"} if "test/acc" in test else set())
    found = _rows(test, worded)
    for part in REPEATED:
        metrics = result.get(part) or {}
        found += [] if f"{part}/acc" in metrics else _rows(metrics)
    return found


def _rows(metrics: Mapping[str, float], leave_out: Iterable[str] = ()) -> list[tuple[str, str]]:
    return [(name, shown(float(metrics[name]))) for name in sorted(set(metrics) - set(leave_out))]


def shown(value: float) -> str:
    """A count without decimals; any other value as in the lines of the epochs."""
    return f"{value:,.0f}" if value.is_integer() and abs(value) > 1 else number(value)


def number(value: float) -> str:
    """Four decimals; four digits where that shows too little of a small number or too much of a large one."""
    return f"{value:.4f}" if value == 0 or 0.001 <= abs(value) < 10_000 else f"{value:.4g}"
