"""What the exchange costs: our sums, all-reduced, against torch.nn.SyncBatchNorm's scheme of gathering.

    python benchmarks/collectives.py                  2, 4 and 8 ranks on this machine, by gloo
    python benchmarks/collectives.py --rounds 20      a quick look

Prints a table, and writes results/collectives-cpu.json and .png.
"""

import argparse
from pathlib import Path
from typing import Any

import harness
import matplotlib as mpl
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

CHANNELS = (64, 512, 2048)
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.13 on


def exchanges(rank: int, world_size: int, rounds: int) -> list[dict[str, Any]]:
    """A layer's two messages, forward and backward, each way."""
    rows = []
    for channels in CHANNELS:
        forward = torch.ones(2 * channels + 1, dtype=torch.float64)
        backward = torch.ones(2 * channels, dtype=torch.float64)
        mine = torch.ones(2 * channels + 1)  # torch: mean, invstd and count in float32
        everyones = torch.empty(world_size * (2 * channels + 1))
        torch_backward = torch.ones(2 * channels)

        def ours(forward: torch.Tensor = forward, backward: torch.Tensor = backward) -> None:
            dist.all_reduce(forward)
            dist.all_reduce(backward)
            forward.fill_(1)  # or it overflows in some thousand rounds
            backward.fill_(1)

        def gathered(
            mine: torch.Tensor = mine, everyones: torch.Tensor = everyones, backward: torch.Tensor = torch_backward
        ) -> None:
            gather(everyones, mine)
            dist.all_reduce(backward)
            backward.fill_(1)

        times = harness.agreed({"ours": ours, "gathered": gathered}, rounds)
        rows.append(
            {"ranks": world_size, "channels": channels, "rounds": rounds}
            | {f"{name}_us": harness.Spread.of([t * 1e6 for t in ts]) for name, ts in times.items()}
            | {"ours/gathered": harness.ratios(times["ours"], times["gathered"])}
            | {"ours_bytes": _ring(8 * (4 * channels + 1), world_size)}
            | {"gathered_bytes": 4 * (2 * channels + 1) * (world_size - 1) + _ring(4 * 2 * channels, world_size)}
        )
    return rows


def _ring(size: int, world_size: int) -> int:
    """Bytes that a rank sends in a ring all-reduce of ``size`` bytes."""
    return round(2 * size * (world_size - 1) / world_size)


def plot(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for channels, color in zip(CHANNELS, ("tab:green", "tab:blue", "tab:red"), strict=True):
        mine = [row for row in rows if row["channels"] == channels]
        ranks = [row["ranks"] for row in mine]
        for name, style in {"ours": "-o", "gathered": "--s"}.items():
            label = f"{name}, C={channels}"
            axes[0].plot(ranks, [row[f"{name}_us"][0] for row in mine], style, color=color, label=label)
            axes[1].plot(ranks, [row[f"{name}_bytes"] / 1e3 for row in mine], style, color=color, label=label)
    axes[0].set_ylabel("µs, forward + backward message")
    axes[1].set_ylabel("kB that a rank sends")
    for axis in axes:
        axis.set_xlabel("ranks")
        axis.set_yscale("log")
        axis.set_xticks(sorted({row["ranks"] for row in rows}))
    axes[0].legend(fontsize=8)
    figure.suptitle(f"gloo, {machine['cores']} cores of {machine['device']}, torch {machine['torch']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="to measure (default 300)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="how many (default 2 4 8)")
    out = harness.RESULTS / "collectives-cpu"
    parser.add_argument("--out", type=Path, default=out, help="the results, as .json and .png")
    args = parser.parse_args()
    rows = [row for ranks in args.ranks for row in harness.on_ranks(ranks, exchanges, args.rounds)]
    table = Table(title="A layer's messages, forward + backward. Median (middle 80 %)", title_justify="left")
    for column in ("ranks", "C", "ours µs", "gathered µs", "ours/gathered", "ours sends", "gathered sends"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            str(row["channels"]),
            f"{row['ours_us'][0]:,.0f}",
            f"{row['gathered_us'][0]:,.0f}",
            "{:.2f} ({:.2f}-{:.2f})".format(*row["ours/gathered"]),
            f"{row['ours_bytes'] / 1e3:,.1f} kB",
            f"{row['gathered_bytes'] / 1e3:,.1f} kB",
        )
    console = Console(width=120)
    console.print(table)
    machine = harness.machine("cpu")
    harness.save(args.out.with_suffix(".json"), {"machine": machine, "rows": rows})
    plot(rows, machine, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
