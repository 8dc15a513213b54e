"""Which ranks share statistics: ``group=`` is plain data until the first all-reduce, then a torch process group.

``"world"``
    all ranks;
``"node"``
    the ranks of one node, as the launcher counts nodes (see :mod:`syncbn.nn.comm.nodes`);
``k`` (an int)
    ``k`` consecutive ranks: 0 to k-1, k to 2k-1, ...; ``k`` must divide the world size;
a ``torch.distributed.ProcessGroup``, or a ``DeviceMesh`` of one dimension
    that process group itself, with its backend and its time-out; kept as its name and its global ranks.

Plain data can be copied, pickled and saved with the module that carries it. For a word or a number the layer makes
its own process groups, at first use: the default group is DistributedDataParallel's, whose all-reduces run in an
order that differs from the layers'. All ranks make them together, with the default group's backend and time-out.
``SYNCBN_OWN_GROUP=0`` in the environment of all ranks has the layers use the default group where it has the right
ranks; ``group=dist.group.WORLD`` does so for one layer.
"""

import json
import operator
import os
import threading
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not by name
from torch.distributed.device_mesh import DeviceMesh

from syncbn.nn.comm import c10d, channels, lockstep, nodes

WORKS = 'use "world", "node", a number of ranks, a ProcessGroup, or a DeviceMesh of one dimension'


class PassedGroup(tuple[int, ...]):
    """The global ranks of a process group that the user made, and the name by which torch knows it."""

    name: str = ""


GroupSpec = str | int | tuple[int, ...]  # a tuple without a name: from a module that an earlier version pickled
GroupPlan = list[tuple[GroupSpec, list[list[int]]]]  # what to make, each with the ranks of all its groups


@dataclass
class _World:
    """The process groups in use in one world, from init_process_group to destroy_process_group.

    Attributes:
        made: the groups for words and numbers; "default" for the default group, None for a rank without partners.
        passed: the user's groups, by name, with the ranks; weak, so that a destroyed group is freed.
        creations: how often ranks have met to make groups.
        lock: one thread makes groups at a time.
    """

    made: dict[GroupSpec, dist.ProcessGroup | Literal["default"] | None] = field(default_factory=dict)
    passed: dict[str, tuple[GroupSpec, weakref.ref[dist.ProcessGroup]]] = field(default_factory=dict)
    creations: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)


_AVAILABLE = dist.is_available()
_worlds: weakref.WeakKeyDictionary[dist.ProcessGroup, _World] = weakref.WeakKeyDictionary()  # by the default group
_latest: tuple[weakref.ref[dist.ProcessGroup] | None, _World] = (None, _World())  # what _world returned last


def parse(group: object) -> GroupSpec:
    """Turns what a user may pass as ``group=`` into plain data.

    Raises:
        ValueError: a word other than "world" or "node", a number below 1, a process group that this rank is not in or
            that was destroyed, a DeviceMesh of several dimensions.
        TypeError: any other type.
    """
    if isinstance(group, dist.ProcessGroup):
        return _passed(group)
    if isinstance(group, tuple) and group and all(type(rank) is int for rank in group):
        return group
    if isinstance(group, str):
        if group in ("world", "node"):
            return group
        raise ValueError(f'group="{group}" is not known; {WORKS}')
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if group is outside or (type(group) is int and group == outside):
        raise ValueError(f"group=GroupMember.NON_GROUP_MEMBER: {_not_a_member()}")
    if isinstance(group, DeviceMesh):
        return _passed(_of_mesh(group))
    size = _whole_number(group)
    if size is None:
        none = " (new_group with use_local_synchronization gives it to ranks that are not members)"
        raise TypeError(f"group={group!r}: {type(group).__name__} is no group{none if group is None else ''}; {WORKS}")
    if size < 1:
        raise ValueError(f"group={size}: a group has at least 1 rank")
    return size


def resolve(spec: GroupSpec) -> dist.ProcessGroup | None:
    """This process's group for ``spec``; None without a process group, or for a rank that shares with no other.

    The first call for a word or a number is collective over the world. While ``torch.compile`` traces, it runs
    eagerly, and the graph keeps its result.

    Raises:
        ValueError: a size that does not divide the world, ranks that leave this one out, or a process group that this
            process does not have; before any collective.
        RuntimeError: a rank did not join the others to make the groups.
    """
    default = dist.group.WORLD if _AVAILABLE else None  # torch.compile guards it: another world recompiles
    if default is None:
        return None
    group = _resolve(spec, default)
    if isinstance(group, str):
        raise ValueError(group)
    return group


def size(spec: GroupSpec) -> int:
    """How many ranks share statistics; 1 where no process group is initialised."""
    group = resolve(spec)
    return 1 if group is None else group.size()


def check_divides(size: int, world_size: int) -> None:
    """Raises ValueError, naming the sizes that work, unless groups of ``size`` ranks make up the world."""
    if world_size % size:
        works = [k for k in range(1, world_size + 1) if world_size % k == 0]
        raise ValueError(f"group={size} does not divide the world size {world_size}; sizes that do: {works}")


@c10d.constant_in_graphs
def alone() -> dist.ProcessGroup | None:
    """A group of this rank alone, for ``syncbn.testing.force_exchange``; None without a process group."""
    default = dist.group.WORLD if _AVAILABLE else None
    if default is None:
        return None
    world = _world(default)
    if "alone" not in world.made:
        world.made["alone"] = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    group: Any = world.made["alone"]
    return group  # type: ignore[no-any-return]


@c10d.constant_in_graphs
def _resolve(spec: GroupSpec, default: Any) -> dist.ProcessGroup | str | None:
    """The group, or an error message: torch.compile would wrap an exception from in here in one of its own."""
    known, world = _latest
    if known is None or known() is not default:
        default = dist.group.WORLD  # torch.compile (2.13) has handed over a fake one
        world = _world(default)
    if isinstance(spec, tuple):
        name: str = getattr(spec, "name", "")
        ranks, reference = world.passed.get(name, (None, None))
        if reference is not None and ranks == spec and c10d.is_registered(passed := reference()):
            return passed
    try:
        if isinstance(spec, tuple):
            return _find(spec, name, default, world)
        if spec not in world.made:
            with world.lock:  # another thread may be making it
                if spec not in world.made:
                    _make(spec, default, world)
    except ValueError as error:
        return str(error)
    group = world.made[spec]
    return default if group == "default" else group


def _world(default: dist.ProcessGroup) -> _World:
    global _latest
    world = _worlds.setdefault(default, _World())
    _latest = weakref.ref(default, _forget), world
    return world


def _forget(default: weakref.ref[dist.ProcessGroup]) -> None:
    """The world was destroyed: lets go of its groups, so that other ranks see their connections close."""
    global _latest
    if _latest[0] is default:
        _latest = (None, _World())


def _whole_number(group: object) -> int | None:
    """``group`` as an int if it is a whole number, of numpy or torch too; else None."""
    if isinstance(group, bool) or getattr(group, "dtype", None) == torch.bool:
        return None
    try:
        return operator.index(group)  # type: ignore[arg-type]
    except TypeError:
        return None


def _not_a_member() -> str:
    rank = f"rank {dist.get_rank()}" if dist.is_initialized() else "this process"
    return f"{rank} is not a member of the passed group; pass each rank a group that it is in"


def _passed(group: dist.ProcessGroup) -> PassedGroup:
    if torch.compiler.is_compiling():
        return group  # type: ignore[return-value]  # the functional form, compiled: its graph takes the group itself
    if not c10d.is_registered(group):
        raise ValueError("group=ProcessGroup: it was destroyed, or its world was; make a new one with new_group")
    passed = PassedGroup(dist.get_process_group_ranks(group))
    passed.name = group.group_name
    return passed


def _of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim != 1:
        first = f"mesh[{mesh.mesh_dim_names[0]!r}]" if mesh.mesh_dim_names else "mesh.get_group(0)"
        raise ValueError(f"group=DeviceMesh of {mesh.ndim} dimensions: pass one of them, group={first} for example")
    if mesh.get_coordinate() is None:
        raise ValueError(f"group=DeviceMesh: {_not_a_member()}")
    try:
        group: dist.ProcessGroup = mesh.get_group()
        return group
    except RuntimeError as error:  # the mesh outlived its world
        raise ValueError(f"group=DeviceMesh: its process group was destroyed; make the mesh anew ({error})") from error


def _find(spec: tuple[int, ...], name: str, default: dist.ProcessGroup, world: _World) -> dist.ProcessGroup:
    """The passed group, by its name; in another process or world, one of the user's groups with the same ranks."""
    if (rank := dist.get_rank()) not in spec:
        raise ValueError(f"rank {rank} is not in group {tuple(spec)}, but runs a layer that synchronizes over it")
    made = {id(group) for group in world.made.values()}
    fits = [
        group
        for group in (default, *c10d.registered())  # the default group first, where several have these ranks
        if id(group) not in made and sorted(dist.get_process_group_ranks(group)) == sorted(spec)
    ]
    found = next((group for group in fits if group.group_name == name), fits[0] if fits else None)
    if found is None:
        raise ValueError(
            f"group={tuple(spec)}: this process has no process group of these ranks; make one with new_group, which is "
            "found then, or pass another: convert(revert(model), group=...)"
        )
    world.passed[name] = spec, weakref.ref(found)
    return found


def _make(spec: GroupSpec, default: dist.ProcessGroup, world: _World) -> None:
    """Finds the group for ``spec`` in this world; makes process groups, together with all ranks, if needed."""
    ranks = default.size()
    if isinstance(spec, int):
        check_divides(spec, ranks)
    wanted = "world" if spec == ranks else spec
    if ranks == 1 or (wanted == "world" and not _own_group()):
        world.made[spec] = "default"
    elif wanted == 1:
        world.made[spec] = None
    else:
        if wanted not in world.made:
            _make_together(wanted, default, world)
        world.made[spec] = world.made[wanted]


def _own_group() -> bool:
    return os.environ.get("SYNCBN_OWN_GROUP", "1") != "0"


def _make_together(wanted: GroupSpec, default: dist.ProcessGroup, world: _World) -> None:
    """Makes the groups that any rank needs, on all ranks in one order, since torch numbers groups.

    With ``device_id=`` new_group calls ncclCommSplit, which every rank of the default group must call (torch 2.13).
    """
    limit = c10d.timeout(default)
    try:
        for spec, blocks in _agree(wanted, default, world, lockstep.patience(limit)):
            world.made[spec] = made = _made(spec, blocks, default, world, limit)
            if isinstance(made, dist.ProcessGroup):
                channels.open_channel(made)  # here all its ranks meet, also those that run compiled code
    except RuntimeError as error:
        raise RuntimeError(
            f"group={json.dumps(wanted)}: {error}; all ranks make this group together, at first use: run the layer on "
            "every rank, or pass a ProcessGroup"
        ) from error


def _made(
    spec: GroupSpec, blocks: list[list[int]], default: dist.ProcessGroup, world: _World, limit: timedelta
) -> dist.ProcessGroup | Literal["default"] | None:
    if len(blocks) == default.size():
        return None
    if len(blocks) == 1 and not _own_group():
        return "default"
    if len(blocks) == 1 and "world" in world.made:
        return world.made["world"]
    # Blocks of one rank too: new_group(use_local_synchronization=True) hashes the number of groups that a rank is in
    # into the name (torch 2.13), so ranks with different numbers of groups would wait for different names.
    groups = [dist.new_group(block, timeout=limit, group_desc=f"syncbn {spec}") for block in blocks]
    (mine,) = (group for group in groups if isinstance(group, dist.ProcessGroup))
    if len(blocks) == 1:
        world.made["world"] = mine
    return mine


def _agree(wanted: GroupSpec, default: dist.ProcessGroup, world: _World, limit: timedelta) -> GroupPlan:
    """The plan of all ranks: every group that some rank needs now. Ranks may reach their layers in different orders.

    It goes over the default group's store, because a collective could pair with another one. Rank 0 reads the needs of
    each rank and writes the plan; the last rank to read it deletes the keys.

    Raises:
        RuntimeError: some ranks did not arrive in time; it names them, on every rank that did.
    """
    rank, ranks = default.rank(), default.size()
    mine = json.dumps([wanted, nodes.whereabouts()])
    if dist.get_backend(default) == "fake":  # torch's stand-in for a world whose other ranks do not exist
        return _plan([mine] * ranks)
    world.creations += 1
    store = PrefixStore(f"syncbn/groups/{world.creations}", c10d.default_store())
    keys = [str(each) for each in range(ranks)]
    store.set(keys[rank], mine)
    try:
        store.wait(["plan"] if rank else keys, limit)
    except RuntimeError:  # each kind of store raises its own subclass
        late = [key for key in keys if not store.check([key])] or ["0"]
        answer: dict[str, Any] = {"late": late, "seconds": limit.total_seconds()}
    else:
        answer = json.loads(store.get("plan")) if rank else {"plan": _plan([store.get(key).decode() for key in keys])}
    if rank == 0:
        store.set("plan", json.dumps(answer))
    if "late" in answer:
        raise RuntimeError(
            f"timed out in the store: {_listed(answer['late'])} did not come within {answer['seconds']:g} s"
        )
    if store.add("read", 1) == ranks:
        for key in (*keys, "plan", "read"):
            store.delete_key(key)
    plan: GroupPlan = answer["plan"]
    return plan


def _plan(needs: list[str]) -> GroupPlan:
    """The plan, from the group that each rank needs and its :func:`syncbn.nn.comm.nodes.whereabouts`."""
    specs, places = zip(*map(json.loads, needs), strict=True)
    ranks = range(len(needs))
    of_node: dict[str, list[int]] = {}
    for rank, name in enumerate(nodes.nodes(list(places))):
        of_node.setdefault(name, []).append(rank)

    def blocks(spec: GroupSpec) -> list[list[int]]:
        if spec == "node":
            return list(of_node.values())
        size = spec if isinstance(spec, int) else len(ranks)
        return [list(ranks[first : first + size]) for first in ranks[::size]]

    return [(spec, blocks(spec)) for spec in sorted(set(specs), key=str)]


def _listed(late: list[str]) -> str:
    more = f" and {len(late) - 8} more" if len(late) > 8 else ""
    return f"rank {', '.join(late[:8])}{more}"
