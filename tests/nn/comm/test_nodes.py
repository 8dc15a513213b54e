"""Which ranks share a node, under each launcher and with what is left over from another."""

import os
import socket
from unittest import mock

import pytest

from syncbn.nn.comm.nodes import nodes, whereabouts


def said(hosts: str, **variables: str) -> list[dict[str, str]]:
    """What each rank says, one letter a rank: its host, and its value of each variable ("-" for not set)."""
    columns = {"host": hosts, **variables}
    return [
        {name: column[rank] for name, column in columns.items() if column[rank] != "-"} for rank in range(len(hosts))
    ]


def members(names: list[str]) -> str:
    """The nodes as letters, in the order in which they come up."""
    order = list(dict.fromkeys(names))
    return "".join("abcdefgh"[order.index(name)] for name in names)


TORCHRUN = {"GROUP_RANK": "0011", "LOCAL_WORLD_SIZE": "2222"}


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        # torchrun: two hosts; two nodes on one host; more ranks on one node; within Slurm, one task a node
        (said("xxyy", **TORCHRUN), "aabb"),
        (said("xxxx", **TORCHRUN), "aabb"),
        (said("xxxyy", GROUP_RANK="00011", LOCAL_WORLD_SIZE="33322"), "aaabb"),
        (said("xxyy", **TORCHRUN, SLURM_NODEID="0011", SLURM_PROCID="0011"), "aabb"),
        # ... and from a shell that srun opened on one node
        (said("xxxx", **TORCHRUN, SLURM_NODEID="0000", SLURM_PROCID="0000"), "aabb"),
        (said("xxyy", **TORCHRUN, SLURM_NODEID="0000", SLURM_PROCID="0000"), "aabb"),
        # launchers that say only how many ranks each node has
        (said("xxyy", LOCAL_WORLD_SIZE="2222"), "aabb"),
        (said("xxxx", LOCAL_WORLD_SIZE="2222"), "aabb"),
        (said("xxxxx", LOCAL_WORLD_SIZE="33322"), "aaabb"),
        (said("xxxx", LOCAL_WORLD_SIZE="2222", NODE_RANK="0011"), "aabb"),
        # srun: one task a rank, in blocks or cyclic; nodes of unequal size; several nodes on one host
        (said("xxyy", SLURM_NODEID="0011", SLURM_PROCID="0123"), "aabb"),
        (said("xyxy", SLURM_NODEID="0101", SLURM_PROCID="0123"), "abab"),
        (said("xxxy", SLURM_NODEID="0001", SLURM_PROCID="0123"), "aaab"),
        (said("xxxx", SLURM_NODEID="0011", SLURM_PROCID="0123"), "aabb"),
        # ... one task a node, which starts its ranks itself
        (said("xxyy", SLURM_NODEID="0011", SLURM_PROCID="0011"), "aabb"),
        # ... a heterogeneous job, should both components count from 0
        (said("xxyyzz", SLURM_NODEID="001100", SLURM_PROCID="012345"), "aabbcc"),
        # Lightning's own launcher: two hosts; two nodes on one host; in a shell that srun opened
        (said("xxyy", NODE_RANK="0011"), "aabb"),
        (said("xxxx", NODE_RANK="0011"), "aabb"),
        (said("xxxx", NODE_RANK="0011", SLURM_NODEID="0000", SLURM_PROCID="0000"), "aabb"),
        (said("xxyy", NODE_RANK="0011", SLURM_NODEID="0000"), "aabb"),
        (said("xxyy", NODE_RANK="0011", SLURM_NODEID="00--", SLURM_PROCID="00--"), "aabb"),
        # our own launcher, which is torchrun's agent on one node
        (said("xxxx", GROUP_RANK="0000", LOCAL_WORLD_SIZE="4444"), "aaaa"),
        # nobody said anything, or not to all, or what cannot be
        (said("xxyy"), "aabb"),
        (said("xxxx", NODE_RANK="-000"), "aaaa"),
        (said("xxyy", NODE_RANK="--11"), "aabb"),
        (said("xxyy", NODE_RANK="0000"), "aabb"),
        (said("xxyy", GROUP_RANK="0000"), "aabb"),
        (said("xxyy", LOCAL_WORLD_SIZE="4444"), "aabb"),
        (said("xxyy", LOCAL_WORLD_SIZE="3333"), "aabb"),
        (said("xxyy", LOCAL_WORLD_SIZE="2244"), "aabb"),
        (said("xxyy", LOCAL_WORLD_SIZE="0000"), "aabb"),
        (said("xxyy", LOCAL_WORLD_SIZE="????"), "aabb"),
    ],
)  # fmt: skip
def test_the_launcher_is_believed_where_it_can_be_right(ranks: list[dict[str, str]], expected: str) -> None:
    assert members(nodes(ranks)) == expected


def test_a_rank_says_what_its_environment_says() -> None:
    with mock.patch.dict(os.environ, {"GROUP_RANK": "3", "SLURM_NODEID": "5", "HOME": "/"}, clear=True):
        assert whereabouts() == {"GROUP_RANK": "3", "SLURM_NODEID": "5", "host": socket.gethostname()}
