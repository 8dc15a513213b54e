"""What looking costs: training with StatisticsMonitor against the same training without, two ranks on the CPU.

    python benchmarks/monitor.py                4 minutes
    python benchmarks/monitor.py --rounds 10    a quick look

The default resnet and the mlp, on the digits, 32 samples a device. One training a case, in which the monitor is there
for ten steps and away for ten, in a new random order each round: ten steps are what it looks once in, by default. The
ratio is that of two neighbouring tens. Prints a table, and writes results/monitor-cpu.json and .png.
"""

import argparse
import logging
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import common
import lightning.pytorch as pl
import matplotlib as mpl
import torch
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from syncbn.training import MLP, Classifier, Digits, ResNet, StatisticsMonitor, SyncBatchNormPlugin
from syncbn.training.metrics_file import MetricsFile

STEPS = 10  # in a turn: trainer.log_every_n_steps
WARM = 2  # rounds that are not counted
CASES = [("resnet", "sync"), ("resnet", "local"), ("mlp", "sync"), ("mlp", "local")]


class Turns(pl.Callback):
    """Calls the monitor in one of each two turns, and notes how long the turns take."""

    def __init__(self, monitor: StatisticsMonitor) -> None:
        self.monitor = monitor
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._draw = random.Random(0)  # the same on all ranks
        self._order: list[bool] = []
        self._left = 0

    def on_train_start(self, *hook: Any) -> None:
        self.monitor.on_train_start(*hook)

    def on_train_batch_start(self, *hook: Any) -> None:
        if not self._left:
            self._order = self._order or self._draw.sample([True, False], 2)
            self._now, self._left = self._order.pop(), STEPS
            torch.distributed.barrier()
            self._since = time.perf_counter()
        if self._now:
            self.monitor.on_train_batch_start(*hook)

    def on_train_batch_end(self, *hook: Any) -> None:
        if self._now:
            self.monitor.on_train_batch_end(*hook)
        self._left -= 1
        if not self._left:
            self.seconds[self._now].append(time.perf_counter() - self._since)

    def on_train_end(self, *hook: Any) -> None:
        self.monitor.on_train_end(*hook)


def turns(rank: int, world_size: int, network: str, norm: str, rounds: int) -> dict[str, Any]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "GROUP_RANK": 0, "MASTER_PORT": 0}
    os.environ |= {k: str(v) for k, v in names.items()} | {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost"}
    net = ResNet() if network == "resnet" else MLP()
    module = Classifier(net, partial(torch.optim.SGD, lr=0.01, momentum=0.9), num_classes=10)
    with tempfile.TemporaryDirectory() as place:
        turning = Turns(StatisticsMonitor(STEPS, place))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy=DDPStrategy(),
            plugins=[SyncBatchNormPlugin()] if norm == "sync" else [],
            callbacks=[turning],
            logger=MetricsFile(Path(place)),
            max_epochs=-1,
            max_steps=2 * STEPS * (rounds + WARM),
            log_every_n_steps=STEPS,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=Digits(batch_size=32))
    on, off = (turning.seconds[there][WARM:] for there in (True, False))
    return {
        "network": network,
        "norm": norm,
        "rounds": rounds,
        "on_ms": common.Spread.of([1e3 * s / STEPS for s in on]),
        "off_ms": common.Spread.of([1e3 * s / STEPS for s in off]),
        "on/off": common.ratios(on, off),
        "median": of_the_median([a / b for a, b in zip(on, off, strict=True)]),
    }


def of_the_median(values: list[float]) -> tuple[float, float]:
    """Between which the median lies at 95 %: two order statistics, whatever the distribution (binomial)."""
    ordered, n = sorted(values), len(values)
    low = int(binom.ppf(0.025, n, 0.5))
    return ordered[max(low - 1, 0)], ordered[min(n - low, n - 1)]


def plot(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for y, row in enumerate(rows):
        (median, low, high), inner = row["on/off"], row["median"]
        axis.plot([low, high], [y, y], color="tab:gray", lw=1, label="middle 80 % of rounds" if y == 0 else None)
        axis.plot(inner, [y, y], color="tab:blue", lw=5, label="median, 95 % interval" if y == 0 else None)
        axis.plot(median, y, "o", color="black")
    axis.axvline(1.02, color="tab:red", ls="--", label="goal: below 1.02")
    axis.axvline(1, color="black", lw=0.5)
    axis.set_yticks(range(len(rows)), [f"{row['network']}, norm={row['norm']}" for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("time of ten steps with the monitor / without")
    axis.legend(fontsize=8)
    figure.suptitle(f"2 ranks, {machine['cores']} cores of {machine['device']}, torch {machine['torch']}", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150, help="of ten steps with and ten without (default 150)")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "monitor-cpu", help="without .json and .png")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    rows = [common.on_ranks(2, turns, *case, args.rounds) for case in CASES]
    table = Table("network", "norm", "ms a step with", "without", "with / without", "its median, 95 %")
    for row in rows:
        spreads = ["{:.2f} ({:.2f}-{:.2f})".format(*row[name]) for name in ("on_ms", "off_ms")]
        ratio = "{:.3f} ({:.2f}-{:.2f})".format(*row["on/off"])
        table.add_row(row["network"], row["norm"], *spreads, ratio, "{:.3f}-{:.3f}".format(*row["median"]))
    Console(width=120).print(table)
    machine = common.machine("cpu")
    common.save(args.out.with_suffix(".json"), {"machine": machine, "rows": rows})
    plot(rows, machine, args.out.with_suffix(".png"))
    print(f"{args.out}.json, .png")


if __name__ == "__main__":
    main()
