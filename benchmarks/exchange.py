"""One all-reduce of a layer between ranks on this machine: through shared memory, against gloo.

    python benchmarks/exchange.py                   2, 4 and 8 ranks
    python benchmarks/exchange.py --rounds 100      a quick look

Each rank computes for a moment before each message, as a layer does. The two ways take turns of 200 messages, and only
the last 100 of each count: after gloo, ranks are out of step with each other and badly placed on the cores for a tenth
of a second, which would count as ours. Prints a table, and writes results/exchange-cpu.json.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from syncbn.nn.comm import all_reduce, channels, groups

TURN, UNCOUNTED = 100, 100
SIZES = (129, 1025, 4097)  # 2C + 1 numbers of float64, for C = 64, 512, 2048


def messages(rank: int, world_size: int, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a message of each size, each way in turns."""
    group = groups.resolve("world")
    assert group is not None
    assert channels.channel(group) is not None, "no shared memory here; see the logger syncbn"
    ways = {
        "ours": lambda x: all_reduce.all_sum(x, group, "benchmark"),
        "gloo": lambda x: dist.all_reduce(x, group=group),
    }
    rows = []
    for size in SIZES:
        times: dict[str, list[float]] = {name: [] for name in ways}
        order, shuffle = list(ways), random.Random(0).shuffle
        for _ in range(max(rounds // TURN, 1)):
            shuffle(order)
            for name in order:
                times[name] += turn(ways[name], size)
        rows.append(
            {"ranks": world_size, "numbers": size, "rounds": len(times["ours"])}
            | {f"{name}_us": harness.Spread.of(each) for name, each in times.items()}
            | {"ours/gloo": harness.ratios(times["ours"], times["gloo"])}
        )
    return rows


def turn(way: Callable[[Tensor], Any], size: int) -> list[float]:
    """Microseconds of messages one after the other."""
    work, times = torch.rand(96, 96), []
    for _ in range(UNCOUNTED + TURN):
        x = torch.ones(size, dtype=torch.float64)
        for _ in range(5):
            work @ work
        start = time.perf_counter()
        way(x)
        times.append((time.perf_counter() - start) * 1e6)
    return times[UNCOUNTED:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="to measure (default 1000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="how many (default 2 4 8)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "exchange-cpu", help="the results, as .json")
    args = parser.parse_args()
    rows = [row for ranks in args.ranks for row in harness.on_ranks(ranks, messages, args.rounds)]
    table = Table(title="One all-reduce, µs. Median (middle 80 %)", title_justify="left")
    for column in ("ranks", "numbers", "ours", "gloo", "ours/gloo"):
        table.add_column(column, justify="right")
    for row in rows:
        spreads = ["{:,.0f} ({:,.0f}-{:,.0f})".format(*row[f"{name}_us"]) for name in ("ours", "gloo")]
        ratio = "{:.3f} ({:.3f}-{:.3f})".format(*row["ours/gloo"])
        table.add_row(str(row["ranks"]), f"{row['numbers']:,}", *spreads, ratio)
    Console(width=120).print(table)
    harness.save(args.out.with_suffix(".json"), {"machine": harness.machine("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
