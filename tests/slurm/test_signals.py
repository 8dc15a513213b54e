"""slurm/train.sbatch is told that its time is nearly up: it goes back into the queue, and nothing shows that it did."""

import os
import random
import sys

import pytest

from tests.slurm.support.cluster import Cluster
from tests.slurm.support.jobs import check, submit
from tests.training.support.faulty_runs import draw, fault
from tests.training.support.train_command import Run

SEED = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(10**6)))
DRAWS = int(os.environ.get("SLURM_DRAWS", 3))
WHEN = ("validation", "a save", "a step", "an epoch's end", "an epoch's last batch", "the test", "the first step")


@pytest.mark.parametrize("number", range(DRAWS))
def test_a_job_that_is_signalled_comes_back_and_ends_as_if_nothing_had_happened(
    cluster: Cluster, straight: Run, number: int
) -> None:
    """The signal, and a second one, at a moment that is drawn: in a step, a validation, a save, the test."""
    source = random.Random(f"{SEED} {number}")
    drawn = draw(source, WHEN[number % len(WHEN)], workers=1, ranks=2)
    print(f"FAULT_SEED={SEED}: {drawn}")
    signal = fault(cluster.place, "warn_job", **drawn.at)
    job = submit(cluster, f"data.num_workers={drawn.workers}", f"resume.every_n_steps={drawn.every_n_steps}", signal)
    ended = cluster.ended(job)
    assert ended.log.count(f"stopped by SIGUSR1: job {job} is requeued") == 1
    check(ended, straight, restarts=1)


def test_a_signal_before_training_begins_waits(cluster: Cluster, straight: Run) -> None:
    """It comes while a task has not even begun with Python. Bash leaves blocked signals blocked, dash does not."""
    python, begun = cluster.place / "python", cluster.place / "begun"
    python.write_text(f'#!/usr/bin/env bash\ntouch {begun}\nsleep 3\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    cluster.environment["SYNCBN_PYTHON"] = str(python)
    job = submit(cluster)
    cluster.started(job)
    cluster.until(job, begun.exists)
    cluster.call("scancel", "--signal=USR1", job)
    ended = cluster.ended(job)
    assert "it resumes from outputs/slurm-" in ended.log
    check(ended, straight, restarts=1)
