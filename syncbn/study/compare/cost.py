"""The cost of each side: seconds per step and the share of collectives, for runs with one process per device."""

import math
from typing import Any

import numpy as np
from scipy import stats

from syncbn.study.compare.layout import Layout
from syncbn.study.compare.pairs import Pairs, Placed, how_they_ran
from syncbn.study.compare.runs.settings import is_simulated


def costs(pairs: Pairs, layout: Layout) -> list[dict[str, Any]]:
    """Rows of ``Comparison.cost``; in each condition the baseline is first."""
    rows = []
    by_cell: dict[tuple[str, str], dict[str, dict[int, Placed]]] = {}
    for each in pairs.placed:
        if each.is_monitored and not is_simulated(each.run):
            by_side = by_cell.setdefault((each.condition, each.place), {})
            by_side.setdefault(each.side, {})[each.seed] = each
    for (condition, _), by_side in sorted(by_cell.items(), key=lambda item: layout.conditions.index(item[0][0])):
        baseline = {seed: seconds_per_step(p) for seed, p in by_side.get(layout.baseline, {}).items()}
        for side in layout.sides:
            runs = {seed: p for seed, p in by_side.get(side, {}).items() if math.isfinite(seconds_per_step(p))}
            if not runs:
                continue
            ratios = [seconds_per_step(p) / baseline[seed] for seed, p in runs.items() if seed in baseline]
            ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
            rows.append(
                {
                    "condition": condition,
                    "side": side,
                    "how": how_they_ran(list(runs.values())),
                    "n": len(runs),
                    "seconds_per_step": float(np.mean([seconds_per_step(p) for p in runs.values()])),
                    "images_per_second": float(np.mean([p.run.number("images_per_second") for p in runs.values()])),
                    "pairs": len(ratios),
                    # The geometric mean of ratios a/b is the inverse of that of b/a; the arithmetic mean is not.
                    "ratio": float(stats.gmean(ratios)) if ratios else math.nan,
                    "ratio_low": min(ratios, default=math.nan),
                    "ratio_high": max(ratios, default=math.nan),
                    "collectives": _mean([_share(p) for p in runs.values()]),
                }
            )
    return rows


def seconds_per_step(placed: Placed) -> float:
    """Seconds per optimizer step, without validation and warm-up; NaN if the run did not measure its speed."""
    config, speed = placed.run.config, placed.run.number("images_per_second")
    batch = (config.get("data") or {}).get("global_batch_size")
    batches = (config.get("trainer") or {}).get("accumulate_grad_batches") or 1
    if not isinstance(batch, int) or not isinstance(batches, int) or not speed > 0:  # a run of one batch reports 0
        return math.nan
    return batch * batches / speed


def _share(placed: Placed) -> float:
    share = (placed.run.result.get("collectives") or {}).get("share")
    return float(share) if isinstance(share, int | float) else math.nan


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
