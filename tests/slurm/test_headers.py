"""Jobs that were asked for wrongly say so before any work, with the header that would do."""

import sys

import pytest

from tests.slurm.support.cluster import Cluster
from tests.slurm.support.jobs import submit


@pytest.mark.parametrize(
    ("options", "settings", "line"),
    [
        (
            ("--nodes=1", "--ntasks=1", "--ntasks-per-node=1"),
            ("trainer.devices=2",),
            "error: trainer.devices=2: srun started 1; leave it out, or ask for #SBATCH --nodes=1 and #SBATCH "
            "--ntasks-per-node=2\n",
        ),
        (
            ("--nodes=1", "--ntasks-per-node=2"),
            ("trainer.devices=1",),
            "error: trainer.devices=1: srun started 2; leave it out, or ask for #SBATCH --nodes=1 and #SBATCH "
            "--ntasks-per-node=1\n",
        ),
        (
            (),
            ("trainer.num_nodes=3",),
            "error: trainer.num_nodes=3: srun started 2; leave it out, or ask for #SBATCH --nodes=3 and #SBATCH "
            "--ntasks-per-node=1\n",
        ),
        (("--job-name=bash",), (), "use another, such as #SBATCH --job-name=syncbn\n"),
    ],
)
def test_a_wrong_header_is_told_of_before_any_work(
    cluster: Cluster, options: tuple[str, ...], settings: tuple[str, ...], line: str
) -> None:
    ended = cluster.ended(submit(cluster, *settings, options=options))
    assert ended.state == "FAILED"
    assert ended.log.count(line) == 1
    assert ended.log.count("error: ") - ended.log.count("srun: error: ") - ended.log.count("slurmstepd") == 1
    assert ended.runs == []


def test_nodes_that_differ_are_told_of(cluster: Cluster) -> None:
    ended = cluster.ended(submit(cluster, options=("--ntasks=3", "--ntasks-per-node=2")))
    assert ended.state == "FAILED"
    line = "error: Slurm: nodes have 2, 1 tasks, and must have as many each; use #SBATCH --nodes=2 and #SBATCH "
    assert ended.log.count(f"{line}--ntasks-per-node=2\n") == 1
    assert ended.runs == []


def test_python_without_srun_is_told_of(cluster: Cluster) -> None:
    script = cluster.place / "mine.sbatch"
    script.write_text(f"#!/bin/sh\n{sys.executable} train.py model=mlp\n", encoding="utf-8")
    job = cluster.sbatch(str(script), options=("--nodes=2", "--ntasks-per-node=1", "--output=%x-%j.out"))
    ended = cluster.ended(job)
    assert ended.state == "FAILED"
    assert ended.log == (
        "error: Slurm: this job has 2 nodes and 2 tasks, but python was not started by srun, so only one "
        "process would train; in the script write: srun python train.py ...\n"
    )
    assert ended.runs == []
