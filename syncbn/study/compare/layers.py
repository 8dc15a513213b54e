"""Finds the layers that need shared statistics, from the statistics monitor's tables, and suggests a setting for them.

A layer needs shared statistics in two cases: a device's statistics correspond to few independent samples, or the
devices' data differ.

- *Few samples* means, without image positions, fewer than 5.7, the geometric mean of 4 and 8, so that an estimate near
  8 does not count as few. In protocol P1, 4 samples have ten times the error of large batches, and 8 have no more error
  than 32. For layers with image positions the effective batch counts, because the positions of one image are not
  independent samples (their intraclass correlation reduces it). It is few below 2.4, the geometric mean of 2.1 and 2.7:
  normalization keeps the contrast within an image, so such layers need less. In the study ``segmentation`` they are
  worth 1.3 to 2.8 with one image on each device, where most of the mIoU is lost, and 2.6 to 6.5 with two, where hardly
  any is. The effective batch of a device is at most its device batch.
- *Different data* means that the spread of the devices' means is more than 3 times the spread expected by chance. The
  criterion applies only to layers without image positions: positions are correlated even if the data do not differ.

Both criteria use runs with shared statistics if there are any. With per-device statistics the first layer's outputs
have the same mean and variance on every device. Later layers then hardly differ between devices, even if their
statistics are noisy or the data differ. In such runs a layer that passes both criteria may still need shared
statistics, so the suggestion is to synchronize all layers.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import pandas as pd

from syncbn.study.compare.layout import Layout
from syncbn.study.compare.pairs import Pairs, Placed
from syncbn.study.compare.runs.labels import at
from syncbn.study.compare.runs.settings import devices

HARMFUL, ENOUGH = 4, 8  # samples, by protocol P1 (MLP(6,64) on digits, after Wu & Johnson 2021)
FEW = math.sqrt(HARMFUL * ENOUGH)
FEW_WITH_POSITIONS = math.sqrt(2.1 * 2.7)  # effective batches, by the study segmentation
MOST_SPREAD = 3.0
FIGURES = ["device_batch", "effective_batch", "spread", "variance_ratio"]
COLUMNS = ["layer", "side", "condition", *FIGURES, "needs"]


def layers(pairs: Pairs, layout: Layout) -> pd.DataFrame:
    """``Comparison.layers``: means over log points and runs, in order of need."""
    frames = []
    for each in pairs.placed:
        seen = each.run.statistics() if each.is_monitored else pd.DataFrame()
        if not seen.empty:
            frame = seen[["layer", *FIGURES]].copy()
            frame[FIGURES] = frame[FIGURES].apply(pd.to_numeric, errors="coerce")
            about = {"side": each.side, "condition": each.condition, "samples": _batch(each), "shares": _shares(each)}
            frames.append(frame.assign(**about))
    if not frames:
        return pd.DataFrame(columns=COLUMNS)
    keys = ["layer", "side", "condition"]
    every = pd.concat(frames, ignore_index=True)
    shared = every[every["shares"]]
    every = pd.concat([shared, every[~every["condition"].isin(shared["condition"])]])
    table = every.groupby(keys, as_index=False, sort=True).mean()
    # The inverse is averaged, because it has an expectation: one log point at which the devices' means agree by
    # chance would dominate a mean of the effective batch.
    table["effective_batch"] = (
        1 / every.assign(inverse=1 / every["effective_batch"]).groupby(keys)["inverse"].mean().values
    )
    table["effective_batch"] = table["effective_batch"].clip(upper=table["device_batch"])
    has_positions = table["device_batch"] > table["samples"]
    worth = table[["effective_batch", "device_batch"]].min(axis=1)
    few = has_positions.map({True: FEW_WITH_POSITIONS, False: FEW})
    table["needs"] = (worth < few) | (~has_positions & (table["spread"] > MOST_SPREAD))
    table["_side"], table["_at"] = (
        table[name].map({label: place for place, label in enumerate(every)})
        for name, every in (("side", layout.sides), ("condition", layout.conditions))
    )
    table = table.sort_values(["needs", "effective_batch", "_at", "layer", "_side"], ascending=[False, *[True] * 4])
    return table[COLUMNS].reset_index(drop=True)


def suggestion(table: pd.DataFrame, pairs: Pairs, layout: Layout) -> str:
    """A sentence for each condition: the setting that synchronizes the layers in need, and why; "" without layers."""
    said: dict[str, list[str]] = {}
    for condition in layout.conditions:
        here = table[table["condition"] == condition]
        if here.empty:
            continue
        sides = [side for side in layout.sides if side in set(here["side"])]
        mine = here[here["side"] == sides[0]]
        placed = [p for p in pairs.placed if p.condition == condition and p.run.config]
        shares = any(_shares(p) for p in placed if p.side == sides[0])
        world = max((devices(p.run) for p in placed), default=1)
        said.setdefault(_advice(mine, world, shares), []).append(condition)
    if len(said) == 1:
        return next(iter(said))
    return " ".join(f"At {at(where)}: {advice}" for advice, where in said.items())


def globs(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Patterns for ``norm.only`` that match all ``names`` and none of the ``others``; the names if no pattern does."""
    if len(names) > 2:
        start = names[0][: next((i for i, c in enumerate(zip(*names, strict=False)) if len({*c}) > 1), None)]
        pattern = f"{start}*"
        if start and not any(fnmatchcase(other, pattern) for other in others):
            return [pattern]
    return sorted(names)


def _batch(placed: Placed) -> float:
    """Samples per device."""
    return float((placed.run.config.get("data") or {}).get("batch_size") or math.inf)


def _shares(placed: Placed) -> bool:
    """Whether devices share statistics."""
    return (placed.run.about.get("normalization_batch") or 0) > _batch(placed)


def _advice(table: pd.DataFrame, world: int, shares: bool) -> str:
    """The suggestion for one side. Without shared statistics it names neither single layers nor a group size."""
    needy, fine = table[table["needs"]], table[~table["needs"]]
    least = table.loc[table["effective_batch"].idxmin()] if table["effective_batch"].notna().any() else None
    worth = f"{least['effective_batch']:.3g} independent samples in {least['layer']}" if least is not None else ""
    if needy.empty:
        return f"no layer needs shared statistics: a device's are worth at least {worth}." if worth else ""
    what = "norm=sync for all layers"
    if shares and not fine.empty:
        listed = ", ".join(f'"{pattern}"' for pattern in globs(sorted(needy["layer"]), list(fine["layer"])))
        what = f"norm=sync norm.only='[{listed}]'"
    if (needy["effective_batch"] < FEW).any():
        why = f"a device's statistics are worth as few as {worth}"
        least_batch = float(needy["effective_batch"].min())
        sizes = [n for n in range(2, world) if world % n == 0 and n * least_batch >= ENOUGH]
        if shares and sizes and not (needy["spread"] > MOST_SPREAD).any():
            what += f" norm.group={sizes[0]}"
            why += f", those of {sizes[0]} devices about {sizes[0] * least_batch:.3g}"
    else:
        why = f"the devices' means differ {needy['spread'].max():.3g} times as much as by chance: they hold other data"
    count = f"{len(needy)} of {len(table)} layers need it" if not fine.empty else f"all {len(table)} need it"
    if not shares:
        count = "which of them alone need it is seen only where statistics are shared: monitor a norm=sync run"
    return f"{what}: {why}; {count}."
