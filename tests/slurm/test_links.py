"""A network that fails: nodes with addresses and host names of their own, one of whose links is cut in mid-training."""

import time

import pytest

from tests.slurm.support.cluster import APART, Cluster
from tests.slurm.support.jobs import check, submit_and_wait
from tests.training.support.train_command import Run

FIRST, SECOND = APART.split(",")
TIMEOUT = 10  # seconds


@pytest.mark.parametrize("cut", [FIRST, SECOND])
def test_a_link_that_is_cut_ends_the_job_and_a_requeue_finishes_it(cluster: Cluster, straight: Run, cut: str) -> None:
    """It is cut within a step of four seconds. In the job's log, on the first node, the second is missing, always."""
    job = submit_and_wait(cluster, f"timeouts.collective={TIMEOUT}", apart=True)
    cluster.script("cut-link", cut)
    since = time.monotonic()
    cluster.until(job, lambda: "error: " in cluster.log(job), timeout=60)
    within = time.monotonic() - since
    (line,) = [line for line in cluster.log(job).splitlines() if line.startswith("error: ")]
    assert f"error: rank 0 of 2 on {FIRST} failed: no response from rank 1 on {SECOND}" in line
    assert within < 4 + TIMEOUT + 10  # the step, the time-out, and a look at who is missing
    cluster.until(job, lambda: cluster.about(job)["JobState"] != "RUNNING", timeout=90)
    cluster.script("mend-link", cut)
    check(cluster.ended(job), straight, restarts=1)
