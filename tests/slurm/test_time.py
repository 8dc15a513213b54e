"""The time limit: a job that is warned comes back, one that is not is ended in its step and can be resumed."""

from pathlib import Path

import pytest

from tests.slurm.support.cluster import Cluster
from tests.slurm.support.jobs import check, submit
from tests.training.support.faulty_runs import fault
from tests.training.support.train_command import Run

# Slurm looks every 30 seconds: the warning comes 45 to 75 seconds after the start. SIGURG does nothing by default.
WARNED, UNWARNED = ("--time=2", "--signal=USR1@45"), ("--time=1", "--signal=URG@1")


@pytest.mark.timeout(900)  # three jobs
def test_a_job_that_is_warned_of_its_time_limit_comes_back_and_one_that_is_not_is_ended(
    tmp_path: Path, straight: Run
) -> None:
    for name in ("warned", "unwarned"):
        (tmp_path / name).mkdir()
    cluster, other = Cluster(tmp_path / "warned"), Cluster(tmp_path / "unwarned")
    warned = submit(cluster, fault(cluster.place, "wait_for_warning", epoch=1, batch=4), options=WARNED)
    unwarned = submit(other, fault(other.place, "sleep", epoch=1, batch=4), options=UNWARNED)

    ended = cluster.ended(warned)
    assert f"stopped by SIGUSR1: job {warned} is requeued" in ended.log
    check(ended, straight, restarts=1)

    ended = other.ended(unwarned)
    assert (ended.state, ended.restarts) == ("TIMEOUT", 0)
    again = submit(other, f"run.id=slurm-{unwarned}")
    check(other.ended(again), straight, restarts=0)
