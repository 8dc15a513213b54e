"""Slurm for the tests in here, once for all processes of pytest-xdist. Where it cannot be had, that is a failure."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, SCRIPT, Cluster
from tests.slurm.jobs import FAULTY
from tests.training.command import Run, train


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_sessionstart(session: pytest.Session) -> None:
    if is_worker(session.config) or session.config.option.collectonly:
        return
    done = subprocess.run([SCRIPT, "up", str(NODES)], capture_output=True, text=True, timeout=400)
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
    """What torchrun makes of the settings of ``jobs.py``, with nothing in its way."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = train(tmp_path_factory.mktemp("straight"), *FAULTY, launcher=torchrun)
    assert run.code == 0, run.err
    return run
