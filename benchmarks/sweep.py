"""What a job of a sweep costs beside its training: ``train.py -m`` against a process for each job.

    python benchmarks/sweep.py                       5 rounds: a sweep of 6 jobs, and 3 calls of train.py
    python benchmarks/sweep.py --rounds 1 --jobs 2   a quick look

A job's overhead is the time it took from the line before it to the line after, less the seconds that it trained. Prints
a table, and writes results/sweep-cpu.json and .png.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import matplotlib as mpl
from rich.console import Console
from rich.table import Table

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
SETTINGS = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=3"]


def swept(jobs: int, logger: str) -> dict[str, float]:
    """Seconds beside training: of the first job, with all that comes before it, and of each further one."""
    with tempfile.TemporaryDirectory() as place:
        seeds = ",".join(map(str, range(jobs)))
        command = ["-m", *SETTINGS, f"logger={logger}", f"seed={seeds}", "hydra.sweep.dir=sweep"]
        begin = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *command], cwd=place, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert process.stdout is not None
        starts = [time.monotonic() for line in process.stdout if line.startswith("job ")]
        assert process.wait() == 0
        end = time.monotonic()
        trained = [_trained(Path(place) / "sweep" / str(job)) for job in range(jobs)]
    borders = [begin, *starts[1:], end]
    beside = [b - a - seconds for (a, b), seconds in zip(pairwise(borders), trained, strict=True)]
    return {"first": beside[0], "further": sum(beside[1:]) / (jobs - 1), "all": sum(beside) / jobs}


def called(logger: str) -> float:
    """Seconds beside training of one job in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        begin = time.monotonic()
        command = [sys.executable, str(TRAIN), *SETTINGS, f"logger={logger}", "run.id=run"]
        subprocess.run(command, cwd=place, stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - begin - _trained(Path(place) / "outputs/run")


def _trained(run_dir: Path) -> float:
    return float(json.loads((run_dir / "result.json").read_text(encoding="utf-8"))["seconds"])


def measure(rounds: int, jobs: int, logger: str) -> dict[str, Any]:
    sweeps, calls = [], []
    for _ in range(rounds):
        turns = [lambda: sweeps.append(swept(jobs, logger)), *[lambda: calls.append(called(logger))] * 3]
        random.shuffle(turns)
        for turn in turns:
            turn()
    theirs = [sum(calls[i : i + 3]) / 3 for i in range(0, len(calls), 3)]
    measured = {f"{name}_s": harness.Spread.of([each[name] for each in sweeps]) for name in sweeps[0]}
    return {
        "logger": logger,
        "jobs": jobs,
        "rounds": rounds,
        "called_s": harness.Spread.of(calls),
        **measured,
        "further/called": harness.ratios([each["further"] for each in sweeps], theirs),
        "all/called": harness.ratios([each["all"] for each in sweeps], theirs),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    bars = {"called": "a process for each job", "first": "the first of a sweep", "further": "each further one"}
    for number, row in enumerate(rows):
        for place, name in enumerate(bars):
            median, low, high = row[f"{name}_s"]
            y = len(bars) * number + place + number
            axis.barh(y, median, xerr=[[median - low], [high - median]], color=f"C{place}")
            axis.text(0.05, y, f"{bars[name]}, logger={row['logger']}", va="center", fontsize=8)
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set_xlabel("seconds that a job takes beside training")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--loggers", nargs="+", default=["wandb", "csv"])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "sweep-cpu", help="without .json and .png")
    options = parser.parse_args()
    rows = [measure(options.rounds, options.jobs, logger) for logger in options.loggers]
    table = Table("logger", "a process each, s", "first of a sweep, s", "further, s", "ours / theirs", "all / theirs")
    for row in rows:
        seconds = [
            f"{row[name][0]:.2f} ({row[name][1]:.2f}-{row[name][2]:.2f})"
            for name in ("called_s", "first_s", "further_s")
        ]
        shares = [
            f"{row[name][0]:.2f} ({row[name][1]:.2f}-{row[name][2]:.2f})" for name in ("further/called", "all/called")
        ]
        table.add_row(row["logger"], *seconds, *shares)
    Console(width=120).print(table)
    harness.save(options.out.with_suffix(".json"), {"machine": harness.machine("cpu"), "rows": rows})
    plot(rows, options.out.with_suffix(".png"))
    print(f"{options.out}.json, .png")


if __name__ == "__main__":
    main()
