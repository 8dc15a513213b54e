"""Opens a channel in shared memory for a process group, if all of its ranks can share memory.

The ranks find out together over the store, when a group is made or first used, and all decide alike. A group
without a channel uses gloo. ``SYNCBN_SHARED_MEMORY=0`` in the environment of any rank turns channels off.
"""

import json
import logging
import os
import secrets
import sys
import weakref
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not by name

from syncbn.nn import torch_internals
from syncbn.nn.comm import c10d, lockstep, shared_memory
from syncbn.nn.comm.shared_memory import Channel, Process

PROBE = timedelta(seconds=30)  # for the first message, which shows that the memory is shared

log = logging.getLogger("syncbn")
_channels: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel | None] = weakref.WeakKeyDictionary()
_reasons: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()
_by_name: weakref.WeakValueDictionary[str, Channel] = weakref.WeakValueDictionary()


@torch.library.custom_op("syncbn::all_sum", mutates_args=())
def _operation(x: Tensor, group: str, place: str) -> Tensor:
    """:meth:`Channel.all_sum` in the group of this name, as an operation that dispatch modes see; ``x`` is kept."""
    total = x.clone()
    _by_name[group].all_sum(total, place)
    return total


@_operation.register_fake
def _(x: Tensor, group: str, place: str) -> Tensor:
    return torch.empty_like(x)


OPERATION = torch.ops.syncbn.all_sum.default


def channel(group: dist.ProcessGroup) -> Channel | None:
    """The channel of ``group``; None if its ranks do not share memory. All of them make the first call together.

    Raises:
        RuntimeError: some ranks did not arrive in time.
    """
    try:
        return _channels[group]
    except KeyError:
        open_channel(group)
        return _channels[group]


def medium(group: dist.ProcessGroup) -> str:
    """The transport of all-reduces on the CPU in ``group``: "shared memory", or the backend and why."""
    if channel(group) is not None:
        return "shared memory"
    backend = c10d.cpu_backend(group)
    return f"{backend}: {_reasons[group]}" if group in _reasons else backend


def open_channel(group: dist.ProcessGroup) -> None:
    """Finds out with all ranks of ``group``, once, whether they share memory, and opens a channel if they do.

    Raises:
        RuntimeError: some ranks did not arrive in time.
    """
    if group in _channels:
        return
    _channels[group] = None
    if c10d.cpu_backend(group) != "gloo":
        return
    ranks = dist.get_process_group_ranks(group)
    found, why = _meet(group, group.group_name)
    _channels[group] = found
    if why:
        _reasons[group] = why
    if found is not None:
        _by_name[group.group_name] = found
    if dist.get_rank() == ranks[0] and len(ranks) > 1:
        how = "share memory" if found else f"communicate through gloo: {why}"
        log.info("process group %s: ranks %s %s", group.group_name, ", ".join(map(str, ranks)), how)


def another(group: dist.ProcessGroup, purpose: str, size: int) -> tuple[Channel, int] | None:
    """A second channel of ``group``, for the all-reduces of another thread, and memory that the ranks share.

    All ranks call it together. The all-reduces of one channel run in one order, so another thread needs its own.

    Args:
        group: the ranks.
        purpose: a name, another one for each call.
        size: bytes of memory.

    Returns:
        The channel, and the address of the memory, to be given back by :func:`.shared_memory.unmap`; None if the ranks
        do not share memory.

    Raises:
        RuntimeError: some ranks did not arrive in time.
    """
    if channel(group) is None:
        return None
    found, _ = _meet(group, f"{group.group_name}/{purpose}")
    if found is None:
        return None
    ranks = dist.get_process_group_ranks(group)
    meeting = _Meeting(f"{group.group_name}/{purpose}/memory", ranks, lockstep.patience(c10d.timeout(group)))
    address, why = _shared(meeting, found.processes, ranks.index(dist.get_rank()), size)
    meeting.end()
    return None if why else (found, address)


def _meet(group: dist.ProcessGroup, name: str) -> tuple[Channel | None, str]:
    """A channel of the ranks of ``group``, or why there is none; all of them call it together."""
    ranks, limit = dist.get_process_group_ranks(group), c10d.timeout(group)
    meeting = _Meeting(name, ranks, lockstep.patience(limit))
    with torch_internals.without_dispatch_modes():  # which would record the test all-reduce
        found, why = _agreed(meeting, ranks, ranks.index(dist.get_rank()))
    meeting.end()
    if found is not None:
        found.limit = limit
    return found, why


class _Meeting:
    """All ranks of a group exchange texts over the store, step by step."""

    def __init__(self, name: str, ranks: list[int], limit: timedelta) -> None:
        self._store = PrefixStore(f"syncbn/shared_memory/{name}", c10d.default_store())
        self._ranks, self._limit, self._steps = ranks, limit, 0

    def exchange(self, text: str) -> list[str]:
        """The texts of all ranks at this step."""
        step, self._steps = self._steps, self._steps + 1
        keys = [f"{step}/{rank}" for rank in self._ranks]
        self._store.set(f"{step}/{dist.get_rank()}", text)
        try:
            self._store.wait(keys, self._limit)
        except RuntimeError:  # each kind of store raises its own subclass
            late = [rank for rank, key in zip(self._ranks, keys, strict=True) if not self._store.check([key])]
            raise RuntimeError(
                f"timed out in the store: rank {', '.join(map(str, late[:8]))} did not come within "
                f"{self._limit.total_seconds():g} s"
            ) from None
        return [self._store.get(key).decode() for key in keys]

    def end(self) -> None:
        """Deletes the texts once all ranks have read them."""
        if self._store.add("read", 1) == len(self._ranks):
            for key in [f"{step}/{rank}" for step in range(self._steps) for rank in self._ranks] + ["read"]:
                self._store.delete_key(key)


def _agreed(meeting: _Meeting, ranks: list[int], index: int) -> tuple[Channel | None, str]:
    """The channel of this group, or why there is none; the same decision on all its ranks."""
    offers = [json.loads(text) for text in meeting.exchange(json.dumps(_offer()))]
    if why := next(filter(None, (offer["why"] for offer in offers)), ""):
        return None, why
    for key, what in (("host", "hosts"), ("space", "process namespaces")):
        if len({offer[key] for offer in offers}) > 1:
            return None, f"its ranks are in several {what}"
    processes = [Process(offer["pid"], offer["started"]) for offer in offers]
    memory, why = _shared(meeting, processes, index, shared_memory.size(len(ranks)))
    if why:
        return None, why
    made = Channel(memory, ranks, index, processes, PROBE)
    why = next(filter(None, meeting.exchange(_probe(made, index, [offer["token"] for offer in offers]))), "")
    return (None, why) if why else (made, "")


def _shared(meeting: _Meeting, processes: list[Process], index: int, size: int) -> tuple[int, str]:
    """The address of ``size`` bytes that the processes share, zeros at first; or why there are none."""
    memory, descriptor, why = shared_memory.make_memory(size) if index == 0 else (0, -1, "")
    try:
        said = json.loads(meeting.exchange(json.dumps([descriptor, why]))[0])
        if said[1]:
            return 0, said[1]
        if index:
            memory, why = shared_memory.open_memory(processes[0].pid, said[0], size)
        if why := next(filter(None, meeting.exchange(why)), ""):
            shared_memory.unmap(memory, size)
            return 0, why
    finally:
        if descriptor != -1:
            os.close(descriptor)
    return memory, ""


def _offer() -> dict[str, Any]:
    """What the other ranks need to know of this one; ``why``, if it cannot share memory."""
    why = ""
    if os.environ.get("SYNCBN_SHARED_MEMORY") == "0":
        why = "SYNCBN_SHARED_MEMORY=0"
    elif shared_memory.library is None:
        why = "the compiled code is missing" if sys.platform == "linux" else "this is not Linux"
    elif not hasattr(os, "memfd_create"):  # Python was built on an old system
        why = "Python has no os.memfd_create"
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
        host = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError as error:
        space, host, why = "", "", why or f"/proc cannot be read ({error.strerror})"
    return {
        "why": why,
        "host": host.strip(),
        "space": space,
        "pid": os.getpid(),
        "started": shared_memory.stat(os.getpid())[1],
        "token": secrets.randbits(48),  # exact in float64
    }


def _probe(made: Channel, index: int, tokens: list[int]) -> str:
    """Why the memory is not shared; empty if it is. Each rank all-reduces the number that it put into the store."""
    message = torch.zeros(len(tokens), dtype=torch.float64, device="cpu")
    message[index] = tokens[index]
    with suppress(RuntimeError):
        made.probe(message)
        if message.tolist() == tokens:
            return ""
    return f"a message from rank to rank did not arrive in the memory of rank {dist.get_rank()}"
