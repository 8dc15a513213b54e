"""Slurm for the tests in here. Where it cannot be had they are skipped, but for CI, where that is a failure."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, Cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    done = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, timeout=400)
    if done.returncode:
        said = f"no local Slurm: {done.stdout}{done.stderr}".strip()
        (pytest.fail if os.environ.get("CI") else pytest.skip)(said)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.script("down")


@pytest.fixture
def cluster(slurm: Cluster, tmp_path: Path) -> Cluster:
    """The cluster, to be submitted to from a directory of this test's."""
    return slurm.at(tmp_path)
