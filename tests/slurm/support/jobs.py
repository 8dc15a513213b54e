"""Jobs in which everything that can be forgotten matters, and whether they ended as if nothing had happened."""

from typing import Any

from syncbn.training.loggers import wandb_files, wandb_internals
from tests.slurm.support.cluster import Cluster, Ended
from tests.training.support.faulty_runs import SETTINGS, differences, fault
from tests.training.support.train_command import PROJECT, Run

ONE_EACH = ("--ntasks-per-node=1", "--time=10")
FAULTY = ("--config-dir", f"{PROJECT}/conf", *SETTINGS, "data.global_batch_size=64", "resume.every_n_steps=7")


def submit(
    cluster: Cluster,
    *settings: str,
    script: str = "slurm/train.sbatch",
    options: tuple[str, ...] = (),
    apart: bool = False,
) -> str:
    return cluster.sbatch(script, *FAULTY, *settings, options=(*ONE_EACH, *options), apart=apart)


def submit_and_wait(cluster: Cluster, *settings: str, **options: Any) -> str:
    """The job, once it is in the middle of a step that takes four seconds."""
    job = submit(cluster, fault(cluster.place, "pause", epoch=1, batch=4), *settings, **options)
    cluster.started(job)
    cluster.until(job, (cluster.place / "once").exists)
    return job


def check(ended: Ended, straight: Run, restarts: int) -> None:
    """One run, with the outcome of an undisturbed one, and one W&B run with every point once."""
    assert ended.state == "COMPLETED", ended.log
    assert ended.restarts == restarts
    run = ended.run()
    assert run.json("run")["status"] == "finished"
    assert differences(run, straight) == []
    attempts = wandb_files.directories(run.directory)
    lines = [line for attempt in attempts for line in wandb_internals.history(attempt)]
    assert len({log.name for log in run.directory.glob("wandb/*run-*/run-*.wandb")}) == 1  # by W&B's id of the run
    points = [(line["trainer/global_step"], name) for line in lines for name in line if name.startswith("train/")]
    assert len(points) == len(set(points))
    assert {step for step, name in points if name == "train/loss_step"} == set(range(3 * 18))
