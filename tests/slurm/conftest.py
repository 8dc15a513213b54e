"""Slurm for the tests in here, once for all processes of pytest-xdist. Where it cannot be had, that is a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.slurm.support.cluster import NODES, SCRIPT, Cluster
from tests.slurm.support.jobs import FAULTY
from tests.training.support.train_command import Run, train

LONG = "SLURM_LONG" in os.environ  # nodes with links of their own, which can be cut
collect_ignore = [] if LONG else ["test_links.py"]


# Above the sum of what a test waits for, so that its own error is reported, with the job's log: 180 s in the queue
# (Cluster.started), 90 s for a step (Cluster.until) and 180 s for the end (Cluster.ended).
LIMIT = 480


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT))


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_sessionstart(session: pytest.Session) -> None:
    if is_worker(session.config) or session.config.option.collectonly:
        return
    command = [SCRIPT, "up", str(NODES), *(["--network"] if LONG else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, encoding="utf-8")
    if done.returncode:
        pytest.exit(f"no local Slurm: {done.stdout}{done.stderr}".strip(), returncode=1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not is_worker(session.config):
        subprocess.run([SCRIPT, "down"], timeout=100)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    """The cluster, to be submitted to from a directory of this test's."""
    return Cluster(tmp_path)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What torchrun makes of the settings of ``jobs.py``, with nothing in its way; once for all of pytest-xdist."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if os.environ.get("PYTEST_XDIST_WORKER") else place) / "straight"
    with FileLock(f"{place}.lock"):
        if not place.exists():
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            place.mkdir()
            run = train(place, *FAULTY, launcher=torchrun)
            assert run.code == 0, run.err
    (about,) = place.glob("outputs/*/run.json")
    return Run(0, "", "", about.parent, [])
