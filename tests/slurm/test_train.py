"""slurm/train.sbatch on two nodes: one run, that stops and comes back as if nothing had happened."""

import os
import random
import sys
import time

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import check, submit, submit_and_wait
from tests.training.command import PROJECT, Run
from tests.training.faulty import draw, fault

SEED = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(10**6)))
DRAWS = int(os.environ.get("SLURM_DRAWS", 3))
WHEN = ("validation", "a save", "a step", "an epoch's end", "an epoch's last batch", "the test", "the first step")


def test_two_nodes_are_one_run_with_the_weights_of_torchrun(cluster: Cluster, straight: Run) -> None:
    job = submit(cluster)
    ended = cluster.ended(job)
    check(ended, straight, restarts=0)
    about = ended.run().json("run")
    assert (about["id"], about["world_size"]) == (f"slurm-{job}", 2)
    assert (
        "2 nodes of 1 process on the CPU, 32 samples each; norm sync over world: statistics of 64 samples" in ended.log
    )
    assert ended.log.count("test accuracy") == 1


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
    assert ended.log.count(f"stopped by SIGUSR1: job {job} goes back into the queue") == 1
    check(ended, straight, restarts=1)


def test_a_signal_before_training_begins_waits(cluster: Cluster, straight: Run) -> None:
    job = submit(cluster)
    while cluster.about(job)["JobState"] != "RUNNING":
        time.sleep(0.1)
    time.sleep(1)  # Python is importing
    cluster.call("scancel", "--signal=USR1", job)
    ended = cluster.ended(job)
    assert "it goes on from outputs/slurm-" in ended.log
    check(ended, straight, restarts=1)


def test_a_job_requeued_from_outside_comes_back(cluster: Cluster, straight: Run) -> None:
    job = submit_and_wait(cluster)
    cluster.call("scontrol", "requeue", job)
    check(cluster.ended(job), straight, restarts=1)


def test_a_cancelled_job_stops_with_a_checkpoint_and_does_not_come_back(cluster: Cluster) -> None:
    job = submit_and_wait(cluster)
    cluster.call("scancel", job)
    ended = cluster.ended(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    assert f"error: stopped by SIGTERM; go on with: sbatch slurm/train.sbatch --config-dir {PROJECT}/conf" in ended.log
    assert "Traceback" not in ended.log
    assert ended.run().json("run")["status"] == "interrupted"


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
    script.write_text(f"#!/bin/sh\n{sys.executable} train.py model=mlp\n")
    job = cluster.sbatch(str(script), options=("--nodes=2", "--ntasks-per-node=1", "--output=%x-%j.out"))
    ended = cluster.ended(job)
    assert ended.state == "FAILED"
    assert ended.log == (
        "error: Slurm: this job has 2 nodes and 2 tasks, but python was not started by srun, so one process is all "
        "that would train; in the script write: srun python train.py ...\n"
    )
    assert ended.runs == []
