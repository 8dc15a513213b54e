"""Finds ranks that share a node: by the launcher's variables, or by host names if these are missing or inconsistent.

The launcher comes first because several of its nodes may share one host. Nodes may have any number of ranks each.
"""

import os
import socket
from collections import Counter

HOST = "host"
# Of torchrun, of srun, and of Lightning's own launcher and some platforms, in this order.
_VARIABLES = ("GROUP_RANK", "LOCAL_WORLD_SIZE", "SLURM_NODEID", "SLURM_PROCID", "NODE_RANK")


def whereabouts() -> dict[str, str]:
    """The launchers' variables in this rank's environment, and its host name."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ} | {HOST: socket.gethostname()}


def nodes(facts: list[dict[str, str]]) -> list[str]:
    """A name of its node for each rank.

    Args:
        facts: the :func:`whereabouts` of every rank, by rank.

    Returns:
        Names by the first source that every rank has and that puts no two hosts onto one node. A variable inherited
        from an interactive shell fails that test, since it is the same everywhere; so do numbers that count from 0
        twice.
    """
    hosts = [rank[HOST] for rank in facts]
    for names in (
        _values(facts, "GROUP_RANK"),
        _by_local_world_size(facts),
        _by_slurm(facts),
        _values(facts, "NODE_RANK"),
    ):
        if names is not None and len(set(zip(names, hosts, strict=True))) == len(set(names)):
            return names
    return hosts


def _values(facts: list[dict[str, str]], variable: str) -> list[str] | None:
    """A variable of every rank; None if some rank lacks it."""
    values = [rank[variable] for rank in facts if variable in rank]
    return values if len(values) == len(facts) else None


def _by_local_world_size(facts: list[dict[str, str]]) -> list[str] | None:
    """Launchers that set only the number of ranks on a node number the ranks node by node."""
    sizes = _values(facts, "LOCAL_WORLD_SIZE")
    names: list[str] = []
    while sizes and len(names) < len(sizes):
        size = sizes[len(names)]
        if not size.isdecimal() or sizes[len(names) : len(names) + int(size)] != [size] * max(int(size), 1):
            return None
        names += [str(len(names))] * int(size)
    return names or None


def _by_slurm(facts: list[dict[str, str]]) -> list[str] | None:
    """Ranks that srun did not start inherit one task number from their shell: a repeated number is not srun's."""
    tasks = Counter(rank["SLURM_PROCID"] for rank in facts if "SLURM_PROCID" in rank)
    return None if any(count > 1 for count in tasks.values()) else _values(facts, "SLURM_NODEID")
