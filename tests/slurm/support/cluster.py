"""A real Slurm of four nodes on this machine, and jobs on it, as a user submits them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.training.support.train_command import REPO, Run, environment

SCRIPT = REPO / "slurm" / "local_cluster.sh"
NODES, APART = 4, "syncbn3,syncbn4"
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "DEADLINE",
    "BOOT_FAIL",
)


@dataclass
class Ended:
    """A job that has ended.

    Attributes:
        number: of the job.
        about: what scontrol says of it, by name.
        log: what its attempts have printed.
        runs: the run directories that there are.
    """

    number: str
    about: dict[str, str]
    log: str
    runs: list[Path]

    @property
    def state(self) -> str:
        return self.about["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.about["Restarts"])

    def run(self) -> Run:
        """Its one run directory, as other tests have it."""
        (directory,) = self.runs
        return Run(int(self.about["ExitCode"].split(":")[0]), self.log, self.log, directory, [])


class Cluster:
    """Slurm's commands against the local cluster, in a directory that has what a user's clone has."""

    def __init__(self, place: Path) -> None:
        for name in ("train.py", "conf", "slurm"):
            (place / name).symlink_to(REPO / name)
        self.place = place
        self.directory = Path(os.environ.get("SYNCBN_SLURM_DIR", "/var/tmp/syncbn-slurm"))
        threads = "OMP_NUM_THREADS"  # a number of which the scripts choose by themselves, as for a user
        self.environment = {name: value for name, value in environment().items() if name != threads} | {
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            "SYNCBN_PYTHON": sys.executable,
        }

    def script(self, *arguments: str) -> str:
        done = subprocess.run(
            [SCRIPT, *arguments], env=self.environment, capture_output=True, text=True, timeout=300, encoding="utf-8"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.place, env=self.environment, capture_output=True, text=True, timeout=60, encoding="utf-8"
        )
        assert done.returncode == 0, (command, done.stdout + done.stderr)
        return done.stdout

    def sbatch(self, script: str, *arguments: str, options: tuple[str, ...] = (), apart: bool = False) -> str:
        """Submits; the number of the job.

        Args:
            script: what is submitted.
            arguments: of the script.
            options: of sbatch.
            apart: onto the nodes for what would disturb other tests' jobs.
        """
        where = f"--nodelist={APART}" if apart else f"--exclude={APART}"
        return self.call("sbatch", "--parsable", where, *options, script, *arguments).strip().split(";")[0]

    def about(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", self.call("scontrol", "show", "job", "--oneliner", job)))

    def log(self, job: str) -> str:
        return "".join(path.read_text(encoding="utf-8") for path in sorted(self.place.glob(f"*-{job}.out")))

    def logs(self) -> str:
        """What all jobs of this directory have printed."""
        return "".join(
            f"{path.name}:\n{path.read_text(encoding='utf-8')}\n" for path in sorted(self.place.glob("*.out"))
        )

    def started(self, job: str, timeout: float = 180) -> None:
        """Waits until the job has left the queue, which depends on the jobs of other tests."""
        self.until(job, lambda: self.about(job)["JobState"] != "PENDING", timeout, every=0.3)

    def until(self, job: str, what: Callable[[], bool], timeout: float = 90, every: float = 0.05) -> None:
        """Waits until it holds, and asks every so many seconds."""
        deadline = time.monotonic() + timeout
        while not what():
            if time.monotonic() > deadline:
                state = self.about(job).get("JobState")
                raise AssertionError(f"job {job} {state}, in {timeout:g} s:\n{self.log(job)}\n{self.tail()}")
            time.sleep(every)

    def ended(self, job: str, timeout: float = 180) -> Ended:
        """The job once it has ended for good.

        Args:
            job: its number.
            timeout: in seconds, from the job's first start.
        """
        self.started(job)
        deadline = time.monotonic() + timeout
        while (about := self.about(job))["JobState"] not in ENDED:
            if time.monotonic() > deadline:
                self.call("scancel", "--signal=KILL", job)
                raise AssertionError(
                    f"job {job} {about['JobState']} after {timeout:g} s:\n{self.log(job)}\n{self.tail()}"
                )
            time.sleep(0.4)
        return Ended(job, about, self.log(job), [p.parent for p in self.place.glob("outputs/*/run.json")])

    def tail(self) -> str:
        return (self.directory / "log" / "slurmctld.log").read_text(encoding="utf-8")[-2000:]
