"""How long ``syncbn runs`` takes for many run directories, as a whole command.

    python benchmarks/list_runs.py                 2,000 runs, five times
    python benchmarks/list_runs.py --runs 200

Prints the median and the range.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.study.support import run_directories


def seconds(directory: Path) -> float:
    """The seconds of one call."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "syncbn", "runs", str(directory)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Make the runs, list them, and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run_directories.copies(Path(directory), given.runs)
        times = [seconds(Path(directory)) for _ in range(given.repeat)]
    print(f"{given.runs} runs: {median(times):.2f} s ({min(times):.2f} to {max(times):.2f}, {given.repeat} calls)")


if __name__ == "__main__":
    main()
