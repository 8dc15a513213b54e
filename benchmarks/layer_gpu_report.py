"""What was measured on a GPU, as tables and a plot."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from layer_gpu import ATEN, COMPILED, COMPILED_BLOCK, PASSES, UNFUSED
from layer_gpu_goals import LOCAL, OURS, OURS_BLOCK, OURS_RELU, TORCH, TORCH_BLOCK, TORCH_RELU, Goal
from rich import box
from rich.table import Table

UNKNOWN = "not measured"
BLANK = "n/m"  # the same, where there is little room
SEVERAL = (
    "With the message between several GPUs: not measured here; fills it where there are N of them:\n"
    "  torchrun --nproc-per-node N benchmarks/{script} --device cuda"
)
PLAIN = [OURS, ATEN, TORCH, LOCAL]
BLOCK = [OURS_BLOCK, TORCH_BLOCK, UNFUSED]


def tables(part: str, rows: list[dict[str, Any]]) -> Iterator[Table | str]:
    """All that a part has to show."""
    measured = [row for row in rows if "skipped" not in row]
    for row in rows:
        if "skipped" in row:
            yield f"{label(row)}: {UNKNOWN}, {row['skipped']}"
    failures = Counter((name, why) for row in rows for name, why in row.get("failed", {}).items())
    for (name, why), cells in failures.items():
        yield f"{name}: {UNKNOWN} in {cells} of {len(rows)} cells, {why}"
    if part == "inductor" and measured:
        names, ratios = [OURS, COMPILED, OURS_BLOCK, COMPILED_BLOCK], [(OURS, COMPILED), (OURS_BLOCK, COMPILED_BLOCK)]
        yield _times("What the compiler makes of the layer", measured, names, ratios, [])
    if part == "cells" and measured:
        ranks = measured[0]["ranks"]
        of = f"{ranks} ranks, with the message" if ranks > 1 else "one process, the exchange forced"
        of += f"; {BLANK}: {UNKNOWN}"
        yield _times(f"The layer: {of}", measured, PLAIN, [(OURS, TORCH), (OURS, LOCAL)], [OURS])
        relu, block = (OURS_RELU, TORCH_RELU), (OURS_BLOCK, TORCH_BLOCK)
        yield _times(f"With a ReLU: {of}", measured, [*relu], [relu], [OURS_RELU])
        yield _times(f"With a residual and a ReLU: {of}", measured, BLOCK, [block], [OURS_BLOCK])
        small = [row for row in measured if "host" in row]
        yield _host(small)
        yield _launches(small)
        yield _memory(measured)


def goals_table(goals: list[Goal]) -> Table:
    return _table("Goals", ["goal", "", "figures"], [list(goal) for goal in goals])


def label(row: dict[str, Any]) -> str:
    kind = {"bfloat16": "bf16", "float32": "fp32"}[row["dtype"]]
    return f"{'x'.join(map(str, row['shape']))} {kind}{' c.last' if row['layout'] != 'contiguous' else ''}"


def _times(
    title: str, rows: list[dict[str, Any]], names: list[str], ratios: list[tuple[str, str]], shares: list[str]
) -> Table:
    columns = ["cell", "MB", *names, *(f"{a} / {b}" for a, b in ratios)]
    columns += [f"{name}: bandw." for name in shares]
    lines = [
        [
            label(row),
            f"{row['bytes'] / 1e6:.1f}",
            *(_number(row.get(f"{name}_us")) for name in names),
            *(_ratio(row.get(f"{a}/{b}")) for a, b in ratios),
            *(_share(row.get(f"{name}_bandwidth")) for name in shares),
        ]
        for row in rows
    ]
    return _table(f"{title}. On the device, forward + backward, µs. Ratios: median (middle 80 %)", columns, lines)


def _host(rows: list[dict[str, Any]]) -> Table:
    names, ratio = [OURS, TORCH, LOCAL, OURS_BLOCK, TORCH_BLOCK], f"{OURS}/{TORCH}"
    lines = [
        [
            label(row),
            *(_number(row["host"].get(f"{name}_us")) for name in names),
            _ratio(row["host"].get(f"{OURS}/{TORCH}")),
        ]
        for row in rows
    ]
    return _table("The host's time, forward + backward, µs", ["cell", *names, ratio], lines)


def _launches(rows: list[dict[str, Any]]) -> Table:
    names = [OURS, TORCH, LOCAL, OURS_BLOCK, TORCH_BLOCK]
    lines = [[label(row), *(_number(row.get("launches", {}).get(name)) for name in names)] for row in rows]
    return _table("Kernels, copies and fills, forward + backward", ["cell", *names], lines)


def _memory(rows: list[dict[str, Any]]) -> Table:
    names = [OURS_BLOCK, TORCH_BLOCK]
    lines = [
        [
            label(row),
            *(_megabytes(row.get("memory", {}).get(name, {}).get(what)) for what in ("kept", "peak") for name in names),
        ]
        for row in rows
    ]
    columns = ["cell", *(f"{what}: {name}" for what in ("kept", "peak") for name in names)]
    return _table(
        "Memory, MB: kept for the backward pass, the input included; at most on top of the inputs", columns, lines
    )


def _table(title: str, columns: list[str], lines: list[list[str]]) -> Table:
    result = Table(title=title, title_justify="left", box=box.SIMPLE)
    for i, column in enumerate(columns):
        result.add_column(
            column, justify="right" if i else "left", no_wrap=i == 0, min_width=16 if "/" in column else None
        )
    for line in lines:
        result.add_row(*line)
    return result


def _number(value: Any) -> str:
    if value is None:
        return BLANK
    return f"{value if isinstance(value, float) else value[0]:,.0f}"


def _ratio(value: Any) -> str:
    return BLANK if value is None else "{:.2f} ({:.2f}-{:.2f})".format(*value)


def _share(value: float | None) -> str:
    return BLANK if value is None else f"{value:.0%}"


def _megabytes(value: int | None) -> str:
    return BLANK if value is None else f"{value / 1e6:,.1f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """How many times as fast as torch's ours is, cell by cell, and what share of the memory's bandwidth it reaches."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["cells"] if "skipped" not in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.45 * len(rows)), sharey=True, layout="constrained")
    pairs = [(OURS, TORCH), (OURS_RELU, TORCH_RELU), (OURS_BLOCK, TORCH_BLOCK), (OURS, LOCAL)]
    for i, (a, b) in enumerate(pairs):
        spreads = [row.get(f"{a}/{b}") for row in rows]
        at = [(k - 0.3 + 0.2 * i, spread) for k, spread in enumerate(spreads) if spread is not None]
        if at:
            faster = [1 / spread[0] for _, spread in at]
            error = [[f - 1 / s[2] for f, (_, s) in zip(faster, at, strict=True)]]
            error += [[1 / s[1] - f for f, (_, s) in zip(faster, at, strict=True)]]
            left.errorbar(faster, [k for k, _ in at], xerr=error, fmt="o", markersize=4, label=f"{a} against {b}")
    for i, name in enumerate(PASSES):
        shares = [100 * row.get(f"{name}_bandwidth", 0) for row in rows]
        right.barh([k - 0.27 + 0.27 * i for k in range(len(rows))], shares, 0.25, label=name)
    left.axvline(1, color="black", linewidth=1)
    left.set_xscale("log")
    left.set_xlabel("times as fast (right of the line: ours is faster)")
    if left.containers:
        left.legend(fontsize=8)
    right.axvline(85, color="black", linewidth=1)
    right.set_xlabel("% of the copy bandwidth")
    right.legend(fontsize=8)
    left.set_yticks(range(len(rows)), [f"{label(row)}, {row['bytes'] / 1e6:.0f} MB" for row in rows])
    left.invert_yaxis()
    machine = result["machine"]
    figure.suptitle(f"Forward + backward on {machine['device']}, torch {machine['torch']}")
    figure.savefig(path, dpi=120)
