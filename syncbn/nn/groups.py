"""Who shares statistics: a group is plain data until the first exchange, then a process group of torch's.

``"world"``
    all ranks;
``"node"``
    the ranks of one node, as the launcher counts nodes (see :mod:`syncbn.nn.nodes`);
``k`` (an int)
    ``k`` consecutive ranks: 0 to k-1, k to 2k-1, ...; ``k`` must divide the world size;
a ``torch.distributed.ProcessGroup``
    those ranks; kept as the tuple of their global ranks.

Plain data can be copied, pickled and saved with the module that carries it. A process group is looked up, or built,
once per process and kept until the world changes.
"""

import weakref

import torch.distributed as dist

from syncbn.nn import nodes

GroupSpec = str | int | tuple[int, ...]

_resolved: dict[GroupSpec, dist.ProcessGroup] = {}
_resolved_for: weakref.ref[dist.ProcessGroup] | None = None


def parse(group: object) -> GroupSpec:
    """Turns what a user may pass as ``group=`` into plain data.

    Raises:
        ValueError: a word other than "world" or "node", or a number below 1.
        TypeError: anything else that is no group.
    """
    if isinstance(group, dist.ProcessGroup):
        return tuple(dist.get_process_group_ranks(group))
    if isinstance(group, tuple) and group and all(type(rank) is int for rank in group):
        return group
    if isinstance(group, str):
        if group in ("world", "node"):
            return group
        raise ValueError(f'group="{group}" is not known; use "world", "node", a number of ranks, or a ProcessGroup')
    if isinstance(group, int) and not isinstance(group, bool):
        if group < 1:
            raise ValueError(f"group={group}: a group has at least 1 rank")
        return group
    raise TypeError(f'group must be "world", "node", an int or a ProcessGroup, not {type(group).__name__}')


def resolve(spec: GroupSpec) -> dist.ProcessGroup | None:
    """This process's group for ``spec``, or None where no process group is initialised.

    The first call for a subgroup is collective over the ranks of the group (over the world for "node").

    Raises:
        ValueError: a size that does not divide the world, or ranks that leave this one out; before any message.
    """
    global _resolved_for
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    assert world is not None
    if _resolved_for is None or _resolved_for() is not world:
        _resolved.clear()
        _resolved_for = weakref.ref(world)
    if spec not in _resolved:
        _resolved[spec] = _build(spec, world)
    return _resolved[spec]


def size(spec: GroupSpec) -> int:
    """How many ranks share statistics; 1 where no process group is initialised."""
    group = resolve(spec)
    return 1 if group is None else group.size()


def _build(spec: GroupSpec, world: dist.ProcessGroup) -> dist.ProcessGroup:
    ranks = _ranks(spec, world)
    if ranks == tuple(range(world.size())):
        return world
    if dist.get_rank() not in ranks:
        raise ValueError(f"rank {dist.get_rank()} is not in group {ranks}, but runs a layer that synchronizes over it")
    # Only the members take part, so that ranks may build their groups in an order of their own.
    built = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(built, dist.ProcessGroup)
    return built


def _ranks(spec: GroupSpec, world: dist.ProcessGroup) -> tuple[int, ...]:
    if spec == "world":
        return tuple(range(world.size()))
    if spec == "node":
        said: list[dict[str, str]] = [{} for _ in range(world.size())]
        dist.all_gather_object(said, nodes.whereabouts())
        names = nodes.nodes(said)
        return tuple(rank for rank, name in enumerate(names) if name == names[dist.get_rank()])
    if isinstance(spec, int):
        check_divides(spec, world.size())
        first = dist.get_rank() // spec * spec
        return tuple(range(first, first + spec))
    assert isinstance(spec, tuple)
    return spec


def check_divides(size: int, world_size: int) -> None:
    """Raises ValueError, naming the sizes that work, unless groups of ``size`` ranks make up the world."""
    if world_size % size:
        works = [k for k in range(1, world_size + 1) if world_size % k == 0]
        raise ValueError(f"group={size} does not divide the world size {world_size}; sizes that do: {works}")
