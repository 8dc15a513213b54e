"""Statistics shared within each node of a real job, and not across."""

import torch

from tests.slurm.cluster import Cluster
from tests.training.command import PROJECT

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--time=10")


def statistics(cluster: Cluster, name: str, *settings: str) -> tuple[list[list[torch.Tensor]], str]:
    """What the ranks have seen of the first batch, by rank; and the log."""
    files = cluster.place / name
    write = f"+callbacks.write={{_target_: faults.WriteStatistics, directory: {files}}}"
    job = cluster.sbatch(
        *("slurm/train.sbatch", "--config-dir", f"{PROJECT}/conf", "model=mlp", "trainer.max_epochs=1", "logger=csv"),
        *("data.batch_size=16", write, *settings),
        options=TWO_BY_TWO,
    )
    ended = cluster.ended(job)
    assert ended.state == "COMPLETED", ended.log
    return [torch.load(files / f"{rank}.pt") for rank in range(4)], ended.log


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_a_group_is_a_node_and_a_batch_size_picks_the_same(cluster: Cluster) -> None:
    node, log = statistics(cluster, "node", "norm.group=node")
    assert "2 nodes of 2 processes on the CPU, 16 samples each; norm sync over node: statistics of 32 samples" in log
    assert equal(node[0], node[1])
    assert equal(node[2], node[3])
    assert not equal(node[1], node[2])
    by_size, log = statistics(cluster, "size", "norm.batch_size=32")
    assert "statistics of 32 samples" in log
    assert all(map(equal, node, by_size))
    world, log = statistics(cluster, "world")
    assert "norm sync over world: statistics of 64 samples" in log
    assert all(equal(world[0], each) for each in world)
    mean = torch.stack([node[0][0], node[2][0]]).mean(0)
    torch.testing.assert_close(world[0][0], mean, rtol=1e-5, atol=1e-7)  # of the same samples
