"""Which ranks share a node: by what their launcher told them, and by host names where it told nothing, or nonsense.

The launcher goes first because several of its nodes may share one host. Nodes may have any number of ranks each.
"""

import os
import socket
from collections import Counter

HOST = "host"
# torchrun's, srun's, and what Lightning's own launcher (and some platforms) set, in this order.
_VARIABLES = ("GROUP_RANK", "LOCAL_WORLD_SIZE", "SLURM_NODEID", "SLURM_PROCID", "NODE_RANK")


def whereabouts() -> dict[str, str]:
    """What this rank knows: the launchers' variables in its environment, and its host."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ} | {HOST: socket.gethostname()}


def nodes(said: list[dict[str, str]]) -> list[str]:
    """A name of its node for each rank.

    Args:
        said: the whereabouts of every rank, by rank.

    Returns:
        Names by the first source that every rank has and that puts no two hosts onto one node. A variable that came
        along from an interactive shell is the same everywhere and does, as do numbers that count from 0 twice.
    """
    hosts = [rank[HOST] for rank in said]
    for names in (_said(said, "GROUP_RANK"), _blocks(said), _slurm(said), _said(said, "NODE_RANK")):
        if names is not None and len(set(zip(names, hosts, strict=True))) == len(set(names)):
            return names
    return hosts


def _said(said: list[dict[str, str]], variable: str) -> list[str] | None:
    values = [rank[variable] for rank in said if variable in rank]
    return values if len(values) == len(said) else None


def _blocks(said: list[dict[str, str]]) -> list[str] | None:
    """Launchers that say only how many ranks a node has number them node by node."""
    sizes = _said(said, "LOCAL_WORLD_SIZE")
    names: list[str] = []
    while sizes and len(names) < len(sizes):
        size = sizes[len(names)]
        if not size.isdecimal() or sizes[len(names) : len(names) + int(size)] != [size] * max(int(size), 1):
            return None
        names += [str(len(names))] * int(size)
    return names or None


def _slurm(said: list[dict[str, str]]) -> list[str] | None:
    """Ranks that srun did not start have the task of the shell that they were started from, all of them."""
    tasks = Counter(rank["SLURM_PROCID"] for rank in said if "SLURM_PROCID" in rank)
    return None if any(count > 1 for count in tasks.values()) else _said(said, "SLURM_NODEID")
