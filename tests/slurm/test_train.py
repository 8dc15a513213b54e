"""slurm/train.sbatch on two nodes: one run, that stops and comes back as if nothing had happened."""

import os
import random
import sys
import time
from collections.abc import Callable

import pytest

from syncbn.training import wandb_files
from tests.slurm.cluster import Cluster, Ended
from tests.training.command import PROJECT, Run, train
from tests.training.faulty import SETTINGS, differences

SEED = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(10**6)))
ONE_EACH = ("--ntasks-per-node=1", "--time=10")
FAULTY = ("--config-dir", f"{PROJECT}/conf", *SETTINGS, "data.global_batch_size=64", "resume.every_n_steps=7")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What torchrun makes of the same settings, with nothing in its way."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = train(tmp_path_factory.mktemp("straight"), *FAULTY, launcher=torchrun)
    assert run.code == 0, run.err
    return run


def submit(cluster: Cluster, *settings: str, script: str = "slurm/train.sbatch", options: tuple[str, ...] = ()) -> str:
    return cluster.sbatch(script, *FAULTY, *settings, options=(*ONE_EACH, *options))


def trains(epoch: int = 1) -> Callable[[str], bool]:
    return lambda log: f"epoch {epoch}/" in log


def check(ended: Ended, straight: Run, restarts: int) -> None:
    """One run, with the outcome of an undisturbed one, and one W&B run with every point once."""
    assert ended.state == "COMPLETED", ended.log
    assert ended.restarts == restarts
    run = ended.run()
    assert run.json("run")["status"] == "finished"
    assert differences(run, straight) == []
    attempts = wandb_files.directories(run.directory)
    lines = [line for attempt in attempts for line in wandb_files.history(attempt)]
    points = [(line["trainer/global_step"], name) for line in lines for name in line if name.startswith("train/")]
    assert len(points) == len(set(points))
    assert {step for step, name in points if name == "train/loss_step"} == set(range(3 * 18))


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


@pytest.mark.parametrize("draw", range(3))
def test_a_job_that_is_signalled_comes_back_and_ends_as_if_nothing_had_happened(
    cluster: Cluster, straight: Run, draw: int
) -> None:
    source = random.Random(f"{SEED} {draw}")
    wait = round(source.uniform(0, 2), 3)
    print(f"FAULT_SEED={SEED}: SIGUSR1 {wait} s after the first epoch")
    job = submit(cluster, "data.num_workers=1")
    cluster.until(job, trains())
    time.sleep(wait)
    cluster.call("scancel", "--signal=USR1", job)
    time.sleep(source.choice([0, 0.1, 0.5]))
    cluster.call("scancel", "--signal=USR1", job)  # a second one changes nothing
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


def test_a_job_that_is_preempted_comes_back(cluster: Cluster, straight: Run) -> None:
    """Without --signal: it is told by SIGTERM, which it has to tell from that of scancel."""
    job = submit(cluster, options=("--signal=0",))
    cluster.until(job, trains())
    cluster.call("srun", "--partition=high", "--nodes=2", "--ntasks-per-node=4", "true")
    check(cluster.ended(job), straight, restarts=1)


def test_a_job_requeued_from_outside_comes_back(cluster: Cluster, straight: Run) -> None:
    job = submit(cluster)
    cluster.until(job, trains())
    cluster.call("scontrol", "requeue", job)
    check(cluster.ended(job), straight, restarts=1)


def test_a_cancelled_job_stops_with_a_checkpoint_and_does_not_come_back(cluster: Cluster) -> None:
    job = submit(cluster)
    cluster.until(job, trains())
    cluster.call("scancel", job)
    ended = cluster.ended(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    assert f"error: stopped by SIGTERM; go on with: sbatch slurm/train.sbatch --config-dir {PROJECT}/conf" in ended.log
    assert "Traceback" not in ended.log
    assert ended.run().json("run")["status"] == "interrupted"


def test_a_node_that_dies_takes_the_job_back_to_its_last_checkpoint(cluster: Cluster, straight: Run) -> None:
    job = submit(cluster)
    cluster.until(job, trains())
    cluster.script("kill-node", "syncbn2")
    cluster.script("start-node", "syncbn2")
    ended = cluster.ended(job)
    assert "it goes on from outputs/slurm-" in ended.log
    check(ended, straight, restarts=1)


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
