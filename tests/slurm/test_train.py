"""slurm/train.sbatch on two nodes is one run, and comes back from the queue or stays away as it was told."""

from tests.slurm.support.cluster import Cluster
from tests.slurm.support.jobs import check, submit, submit_and_wait
from tests.training.support.train_command import PROJECT, Run


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


def test_a_job_requeued_from_outside_comes_back(cluster: Cluster, straight: Run) -> None:
    job = submit_and_wait(cluster)
    cluster.call("scontrol", "requeue", job)
    check(cluster.ended(job), straight, restarts=1)


def test_a_cancelled_job_stops_with_a_checkpoint_and_does_not_come_back(cluster: Cluster) -> None:
    job = submit_and_wait(cluster)
    cluster.call("scancel", job)
    ended = cluster.ended(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)
    assert f"error: stopped by SIGTERM; resume with: sbatch slurm/train.sbatch --config-dir {PROJECT}/conf" in ended.log
    assert "Traceback" not in ended.log
    assert ended.run().json("run")["status"] == "interrupted"
