"""What looking costs: training with StatisticsMonitor against the same training without, two ranks on the CPU.

    python benchmarks/monitor.py                2 minutes
    python benchmarks/monitor.py --rounds 20    a quick look

The default resnet and the mlp, on the digits, 32 samples a device. One training a case: in each round one step is
looked at and one is not, in a random order. By default one step in ten is looked at and nine are left alone, so
training takes longer by a tenth of what that step does. Prints a table, and writes results/monitor-cpu.json and .png.
"""

import argparse
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import harness
import lightning.pytorch as pl
import matplotlib as mpl
import torch
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from syncbn.training import MLP, Classifier, Digits, ResNet, StatisticsMonitor, SyncBatchNormPlugin
from syncbn.training.loggers.csv_logger import MetricsFile

EVERY = 10  # trainer.log_every_n_steps
WARM = 5  # rounds that are not counted
CASES = [("resnet", "sync"), ("resnet", "local"), ("mlp", "sync"), ("mlp", "local")]


class Turns(pl.Callback):
    """Calls the monitor in one of each two steps, and notes how long both take."""

    def __init__(self, monitor: StatisticsMonitor) -> None:
        self.monitor = monitor
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self._draw = random.Random(0)  # the same on all ranks
        self._order: list[bool] = []

    def on_train_start(self, *hook: Any) -> None:
        self.monitor.on_train_start(*hook)

    def on_train_batch_start(self, *hook: Any) -> None:
        self._order = self._order or self._draw.sample([True, False], 2)
        torch.distributed.barrier()
        self._since = time.perf_counter()
        if self._order[-1]:
            self.monitor.on_train_batch_start(*hook)

    def on_train_batch_end(self, *hook: Any) -> None:
        looked = self._order.pop()
        if looked:
            self.monitor.on_train_batch_end(*hook)
        torch.distributed.barrier()  # a rank that is early waits for the other in either kind of step
        self.seconds[looked].append(time.perf_counter() - self._since)

    def on_train_end(self, *hook: Any) -> None:
        self.monitor.on_train_end(*hook)


def turns(rank: int, world_size: int, network: str, norm: str, rounds: int) -> dict[str, Any]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "GROUP_RANK": 0, "MASTER_PORT": 0}
    os.environ |= {k: str(v) for k, v in names.items()} | {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost"}
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    net = ResNet() if network == "resnet" else MLP()
    module = Classifier(net, partial(torch.optim.SGD, lr=0.01, momentum=0.9), num_classes=10)
    with tempfile.TemporaryDirectory() as place:
        turning = Turns(StatisticsMonitor(1, place))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy=DDPStrategy(),
            plugins=[SyncBatchNormPlugin()] if norm == "sync" else [],
            callbacks=[turning],
            logger=MetricsFile(Path(place)),
            max_epochs=-1,
            max_steps=2 * (rounds + WARM),
            log_every_n_steps=EVERY,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=Digits(batch_size=32))
    on, off = (turning.seconds[looked][WARM:] for looked in (True, False))
    ratios = [a / b for a, b in zip(on, off, strict=True)]
    return {
        "network": network,
        "norm": norm,
        "rounds": rounds,
        "looked_at_ms": harness.Spread.of([1e3 * seconds for seconds in on]),
        "left_alone_ms": harness.Spread.of([1e3 * seconds for seconds in off]),
        "looked_at/left_alone": harness.Spread.of(ratios),
        "training": [1 + (ratio - 1) / EVERY for ratio in (statistics.median(ratios), *of_the_median(ratios))],
    }


def of_the_median(values: list[float]) -> tuple[float, float]:
    """Between which the median lies at 95 %: two order statistics, whatever the distribution (binomial)."""
    ordered, n = sorted(values), len(values)
    low = int(binom.ppf(0.025, n, 0.5))
    return ordered[max(low - 1, 0)], ordered[min(n - low, n - 1)]


def plot(rows: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.5), layout="constrained")
    for y, row in enumerate(rows):
        median, low, high = row["training"]
        axis.errorbar(median, y, xerr=[[median - low], [high - median]], fmt="o", color="tab:blue", capsize=4)
    axis.axvline(1.02, color="tab:red", ls="--", label="goal: below 1.02")
    axis.axvline(1, color="black", lw=0.5)
    axis.set_yticks(range(len(rows)), [f"{row['network']}, norm={row['norm']}" for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel("time of training with the monitor / without; median and its 95 % interval")
    axis.legend(fontsize=8)
    figure.suptitle(f"2 ranks, {machine['cores']} cores of {machine['device']}, torch {machine['torch']}", fontsize=9)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="of a step with and one without (default 300)")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "monitor-cpu", help="without .json and .png")
    args = parser.parse_args()
    rows = [harness.on_ranks(2, turns, *case, args.rounds) for case in CASES]
    table = Table("network", "norm", "left alone, ms", "looked at, ms", "ratio of the steps", "ratio of training, 95 %")
    for row in rows:
        cells = ["{:.1f} ({:.1f}-{:.1f})".format(*row[name]) for name in ("left_alone_ms", "looked_at_ms")]
        cells.append("{:.2f} ({:.2f}-{:.2f})".format(*row["looked_at/left_alone"]))
        table.add_row(row["network"], row["norm"], *cells, "{:.3f} ({:.3f}-{:.3f})".format(*row["training"]))
    Console(width=120).print(table)
    machine = harness.machine("cpu")
    harness.save(args.out.with_suffix(".json"), {"machine": machine, "rows": rows})
    plot(rows, machine, args.out.with_suffix(".png"))
    print(f"{args.out}.json, .png")


if __name__ == "__main__":
    main()
