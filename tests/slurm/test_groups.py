"""Statistics shared within each node of a real job, and not across."""

import torch

from tests.slurm.support.cluster import Cluster
from tests.training.support.train_command import PROJECT

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--time=10")


def submit(cluster: Cluster, name: str, setting: str) -> str:
    """A job whose ranks write down what they have seen of the first batch."""
    write = f"+callbacks.write={{_target_: faults.WriteStatistics, directory: {cluster.place / name}}}"
    return cluster.sbatch(
        *("slurm/train.sbatch", "--config-dir", f"{PROJECT}/conf", "model=mlp", "trainer.max_epochs=1", "logger=csv"),
        *("data.batch_size=16", write, setting),
        options=TWO_BY_TWO,
    )


def statistics(cluster: Cluster, name: str, job: str) -> list[list[torch.Tensor]]:
    """What they have written, by rank."""
    log = cluster.ended(job).log
    assert cluster.about(job)["JobState"] == "COMPLETED", log
    assert "2 nodes of 2 processes on the CPU, 16 samples each; norm sync over " in log
    assert "statistics of 32 samples" in log
    return [torch.load(cluster.place / name / f"{rank}.pt") for rank in range(4)]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_a_group_is_a_node_and_a_batch_size_picks_the_same(cluster: Cluster) -> None:
    settings = {"node": "norm.group=node", "size": "norm.batch_size=32"}
    jobs = {name: submit(cluster, name, setting) for name, setting in settings.items()}
    node, by_size = (statistics(cluster, name, job) for name, job in jobs.items())
    assert equal(node[0], node[1])
    assert equal(node[2], node[3])
    assert not equal(node[1], node[2])
    assert all(map(equal, node, by_size))
