"""One all-reduce of a layer between ranks on this machine: through shared memory, against gloo.

    python benchmarks/exchange.py                   2, 4 and 8 ranks
    python benchmarks/exchange.py --rounds 50       a quick look

Each rank computes for a moment before each message, as a layer does. Prints a table, and writes
results/exchange-cpu.json.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from syncbn.nn.comm import all_reduce, channels, groups

SIZES = (129, 1025, 4097)  # 2C + 1 numbers of float64, for C = 64, 512, 2048


def messages(rank: int, world_size: int, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of a message of each size, each way in turns."""
    group = groups.resolve("world")
    assert group is not None
    assert channels.channel(group) is not None, "no shared memory here; see the logger syncbn"
    work = torch.rand(96, 96)
    ways = {
        "ours": lambda x: all_reduce.all_sum(x, group, "benchmark"),
        "gloo": lambda x: dist.all_reduce(x, group=group),
    }
    rows = []
    for size in SIZES:
        times: dict[str, list[float]] = {name: [] for name in ways}
        order, shuffle = list(ways), random.Random(0).shuffle
        for done in range(rounds + 5):
            shuffle(order)
            for name in order:
                x = torch.ones(size, dtype=torch.float64)
                for _ in range(5):
                    work @ work
                start = time.perf_counter()
                ways[name](x)
                if done >= 5:
                    times[name].append((time.perf_counter() - start) * 1e6)
        rows.append(
            {"ranks": world_size, "numbers": size, "rounds": rounds}
            | {f"{name}_us": harness.Spread.of(each) for name, each in times.items()}
            | {"ours/gloo": harness.ratios(times["ours"], times["gloo"])}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500, help="to measure (default 500)")
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
