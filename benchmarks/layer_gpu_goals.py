"""What the measurements on a GPU were to show, and whether these do."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

# What follows a comma is an operation of its own; what does not is fused.
OURS, TORCH, LOCAL = "ours", "torch sync", "per-device"
OURS_RELU, TORCH_RELU = "ours relu", "torch sync, relu"
OURS_BLOCK, TORCH_BLOCK = "ours add relu", "torch sync, add, relu"
LARGE = 100e6  # bytes from which the memory's bandwidth is what counts
SMALL = 2  # the batch at which the host's time is


class Goal(NamedTuple):
    """A goal and what became of it.

    Attributes:
        what: the goal.
        verdict: "met", "not met", or "not measured": nothing that was measured is against it, but something was not.
        figures: on which this rests.
    """

    what: str
    verdict: str
    figures: str


def of_layer(rows: list[dict[str, Any]]) -> list[Goal]:
    """The goals of the layer, from the rows of :func:`layer_gpu.measure`; see there for their keys."""
    rows = [row for row in rows if "skipped" not in row]
    beyond_spread = [None if ratio is None else ratio[1] for ratio in _get(rows, f"{OURS}/{TORCH}", first=False)]
    faster = [_inverse(ratio) for ratio in _get(rows, f"{OURS}/{TORCH}")]
    large = [row for row in rows if row["bytes"] > LARGE]
    bandwidth, with_residual = (_get(large, f"{name}_bandwidth", first=False) for name in (OURS, OURS_BLOCK))
    small = [row.get("host", {}) for row in rows if row["shape"][0] == SMALL]
    host = [_inverse(ratio) for ratio in _get(small, f"{OURS}/{TORCH}")]
    fused = [_inverse(ratio) for ratio in _get(rows, f"{OURS_BLOCK}/{TORCH_BLOCK}")]
    return [
        each("never slower than torch's synchronized layer, beyond the spread", beyond_spread, most=1.0),
        median("1.3 times as fast as torch's synchronized layer, in the median", faster, least=1.3),
        each("85 % of the memory's bandwidth on tensors over 100 MB", bandwidth, least=0.85),
        each("half of torch's host time at batch 2", host, least=2.0),
        each("with residual and ReLU 1.6 times as fast as torch's layer, add and ReLU", fused, least=1.6),
        each("the same in 8 passes and the residual's 2: 85 % of the bandwidth over 100 MB", with_residual, least=0.85),
    ]


def of_training(rows: list[dict[str, Any]]) -> list[Goal]:
    """The goal of the training step, from the rows of ``resnet50.py``."""
    ratios = _get([row for row in rows if row["batch"] == 256], f"{OURS}/{LOCAL}")
    return [each("within 3 % of per-device batch norm's images/s at batch 256", ratios, least=0.97)]


def each(what: str, figures: list[float | None], *, least: float | None = None, most: float | None = None) -> Goal:
    """Whether every figure is at ``least`` or at ``most`` so much. None is one that could not be measured."""
    known = [figure for figure in figures if figure is not None]
    kept = [figure for figure in known if _within(figure, least, most)]
    all_known = len(known) == len(figures) > 0
    verdict = "not met" if len(kept) < len(known) else "met" if all_known else "not measured"
    of = f"{len(kept)} of {len(figures)} cells" + (f", {_range(known)}" if known else "")
    return Goal(what, verdict, of)


def median(what: str, figures: list[float | None], *, least: float) -> Goal:
    """Whether the figures' median is at ``least`` so much."""
    known = [figure for figure in figures if figure is not None]
    if not known or len(known) < len(figures):
        return Goal(what, "not measured", f"{len(known)} of {len(figures)} cells")
    middle = statistics.median(known)
    return Goal(what, "met" if middle >= least else "not met", f"{middle:.2f}, {_range(known)}")


def _get(rows: list[dict[str, Any]], key: str, first: bool = True) -> list[Any]:
    """A figure of each row, None where it has none; of a spread the ``first`` number, the median."""
    values = (row.get(key) for row in rows)
    return [value[0] if first and value is not None else value for value in values]


def _inverse(ratio: float | None) -> float | None:
    return None if ratio is None else 1 / ratio


def _within(figure: float, least: float | None, most: float | None) -> bool:
    return (least is None or figure >= least) and (most is None or figure <= most)


def _range(figures: Iterable[float]) -> str:
    figures = list(figures)
    return f"{min(figures):.2f} to {max(figures):.2f}"
