"""The all-reduce of ranks on one host, through memory that they share: 30 microseconds where gloo takes a millisecond.

A process group has a *channel* if all its ranks can share memory. They find that out together, over the store, when
the group is made or first used (:func:`open_channel`). Without a channel the layers use gloo. The protocol is in
``kernels/shared_memory.c``.

``SYNCBN_SHARED_MEMORY=0`` in the environment of any rank turns it off.
"""

import ctypes
import errno
import json
import logging
import os
import secrets
import sys
import threading
import time
import weakref
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # exported, but not by name

from syncbn.nn import native, torch_internals
from syncbn.nn.comm import c10d, lockstep

CAPACITY = 8192  # numbers of one call; a longer message takes several
SLICE = 0.2  # seconds between two looks at whether the ranks that are waited for still live
SPINS = 2000  # about 50 µs; a rank that comes within that time costs no system call
PROBE = timedelta(seconds=30)  # for the first message, which shows that the memory is shared
_PLACE, _BYTES = 240, 8  # bytes of a place, as in shared_memory.c, and of a number
_DONE, _LATE, _OUT_OF_STEP, _GIVEN_UP = range(4)

log = logging.getLogger("syncbn")


class Process(NamedTuple):
    """A process of this host: its id, and when it started, in the kernel's ticks; an id is used again."""

    pid: int
    started: str

    def lives(self) -> bool:
        """Whether it has not ended; one that its parent has not asked for yet has."""
        state, started = _stat(self.pid)
        return started == self.started and state not in "ZX"


def _stat(pid: int) -> tuple[str, str]:
    """State and start time of a process; "X" and "" if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return fields[0], fields[19]


def _load() -> ctypes.CDLL | None:
    library = native.load()
    if library is None or not hasattr(library, "syncbn_shared_all_sum"):  # another system than Linux
        return None
    size, flag, call, address = ctypes.c_int64, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p
    at: list[Any] = [address, flag, size, flag, call]
    library.syncbn_shared_size.argtypes, library.syncbn_shared_size.restype = [flag, size], size
    library.syncbn_shared_map.argtypes, library.syncbn_shared_map.restype = [flag, size], address
    library.syncbn_shared_unmap.argtypes, library.syncbn_shared_unmap.restype = [address, size], None
    library.syncbn_shared_all_sum.argtypes = [*at, address, size, size, size, ctypes.c_char_p, flag, size]
    library.syncbn_shared_receive.argtypes = [*at, address, size, flag, size]
    library.syncbn_shared_give_up.argtypes, library.syncbn_shared_give_up.restype = [address, flag, flag], call
    library.syncbn_shared_arrived.argtypes, library.syncbn_shared_arrived.restype = [address, flag], call
    library.syncbn_shared_header.argtypes = [address, flag, call, *[ctypes.POINTER(size)] * 2, ctypes.c_char_p]
    library.syncbn_shared_header.restype = None
    return library


_library = _load()


class Channel:
    """The memory that the ranks of a group share, for one of them.

    Args:
        memory: its address; :func:`_size` bytes, zeros at first.
        ranks: the global ranks of the group.
        index: this rank's place among them.
        processes: of all ranks.
        limit: the group's time-out.
    """

    def __init__(self, memory: int, ranks: list[int], index: int, processes: list[Process], limit: timedelta) -> None:
        assert _library is not None
        self.limit = limit
        self._ranks, self._index, self._processes = ranks, index, processes
        self._address = memory
        self._call = 0
        self._broken = ""  # the error after which ranks may be out of step
        self._lock = threading.Lock()
        # Where ranks outnumber the cores, a rank that spins keeps the core from the rank that it waits for.
        self._spins = SPINS if len(ranks) <= len(os.sched_getaffinity(0)) else 0
        self._library = _library
        self._pid = os.getpid()
        weakref.finalize(self, _leave, memory, len(ranks), index, self._pid)

    def takes(self, x: Tensor) -> bool:
        """Whether it sends this tensor; a forked process has no part in the group of its parent."""
        plain = type(x) is Tensor and x.dtype is torch.float64 and x.device.type == "cpu" and x.is_contiguous()
        return plain and os.getpid() == self._pid

    def all_sum(self, x: Tensor, place: str) -> None:
        """Replaces ``x`` by the sum over the ranks, taken in rank order, so it is bitwise the same on each.

        Args:
            x: one that :meth:`takes` accepts, of the same shape on every rank.
            place: the layer and the direction; ranks at different ones are out of step.

        Raises:
            RuntimeError: ranks are out of step, one has ended, or one did not come in time. The channel cannot be used
                after the last two: an error is raised again.
        """
        with self._lock, _profiled(x):
            if self._broken:
                raise RuntimeError(f"shared memory: the group cannot be used since an earlier error: {self._broken}")
            try:
                self._send(x.data_ptr(), x.numel(), place.encode(errors="replace")[: _PLACE - 1])
            except _OutOfStepError:  # all ranks have come to this call, and all raise this; the next call works
                raise
            # This rank will never come to this call again, even if the error is of a signal's handler and is caught. So
            # the ranks would be out of step by one call, and the sums wrong.
            except BaseException as error:
                self._broken = str(error) or type(error).__name__
                blamed = error.blamed if isinstance(error, _MissingError) else -1
                self._library.syncbn_shared_give_up(self._address, self._index, blamed)
                raise

    def probe(self, message: Tensor) -> None:
        """The first message, which the layers do not know of; a channel for which it fails is of no use."""
        self._send(message.data_ptr(), message.numel(), b"the first message")

    def _send(self, values: int, numbers: int, place: bytes) -> None:
        for start in range(0, numbers, CAPACITY):
            count = min(CAPACITY, numbers - start)
            self._exchange(values + start * _BYTES, count, start, numbers, place)

    def _exchange(self, values: int, count: int, start: int, numbers: int, place: bytes) -> None:
        self._call = call = (self._call + 1) % 2**32
        at = (self._address, len(self._ranks), CAPACITY, self._index, call)
        slice_ = int(SLICE * 1e9)
        code = self._library.syncbn_shared_all_sum(*at, values, count, start, numbers, place, self._spins, slice_)
        if code == _DONE:
            return
        deadline = time.monotonic() + self.limit.total_seconds()
        while code == _LATE:
            self._check_others(call, deadline)
            code = self._library.syncbn_shared_receive(*at, values, count, 0, slice_)
        if code == _OUT_OF_STEP:
            raise _OutOfStepError(self._out_of_step(call))
        if code == _GIVEN_UP:
            first = self._library.syncbn_shared_give_up(self._address, self._index, -1)
            by, blamed = first % 2**16 - 1, first // 2**16 - 1
            if blamed < 0:
                raise RuntimeError(f"shared memory: {self._named([by])} no longer takes part")
            if blamed == self._index:
                seconds = self.limit.total_seconds()
                raise RuntimeError(f"shared memory: {self._named([by])} waited {seconds:g} s for this rank, in vain")
            if self._processes[blamed].lives():
                raise RuntimeError(self._late([blamed]))
            raise RuntimeError(f"shared memory: {self._named([blamed])} has ended")

    def _missing(self, call: int) -> list[int]:
        """The places of the ranks that have not arrived for this call."""
        indices = range(len(self._ranks))
        return [i for i in indices if self._library.syncbn_shared_arrived(self._address, i) != call]

    def _check_others(self, call: int, deadline: float) -> None:
        """Raises RuntimeError if a rank that has not arrived has ended, or the time is up."""
        ended = [i for i in self._missing(call) if not self._processes[i].lives()]
        # One may have arrived between the two looks, and ended after that.
        if ended := [i for i in ended if i in self._missing(call)]:
            raise _MissingError(f"shared memory: {self._named(ended)} has ended", ended[0])
        if time.monotonic() > deadline and (late := self._missing(call)):
            raise _MissingError(self._late(late), late[0])

    def _late(self, indices: list[int]) -> str:
        seconds = self.limit.total_seconds()
        return f"Timed out in shared memory: {self._named(indices)} did not come within {seconds:g} s"

    def _named(self, indices: list[int]) -> str:
        return f"rank {', '.join(str(self._ranks[i]) for i in indices)}"

    def _out_of_step(self, call: int) -> str:
        """The others that are at another place than this rank, and where they are."""
        mine, places = self._said(self._index, call), dict[str, list[int]]()
        for index in range(len(self._ranks)):
            if (said := self._said(index, call)) != mine:
                places.setdefault(said, []).append(index)
        return "; ".join(f"{self._named(at)} is at {said}, and this rank at {mine}" for said, at in places.items())

    def _said(self, index: int, call: int) -> str:
        numbers, start, place = ctypes.c_int64(), ctypes.c_int64(), ctypes.create_string_buffer(_PLACE)
        self._library.syncbn_shared_header(self._address, index, call, numbers, start, place)
        more = f" from number {start.value}" if start.value else ""
        return f"{place.value.decode(errors='replace')}, {numbers.value} numbers{more}"


class _MissingError(RuntimeError):
    """A rank has ended, or has not come in time: the one at the place ``blamed``."""

    def __init__(self, message: str, blamed: int) -> None:
        super().__init__(message)
        self.blamed = blamed


class _OutOfStepError(RuntimeError):
    """The ranks are at different layers, or send different sizes."""


def _profiled(x: Tensor) -> AbstractContextManager[Any]:
    """torch's profiler does not see what is not a process group's; this shows it there."""
    if not torch_internals.profiler_is_active():
        return nullcontext()
    return torch.profiler.record_function(f"syncbn::allreduce in shared memory, {list(x.shape)} of double")


def _leave(memory: int, ranks: int, index: int, pid: int) -> None:
    """Tells the others that this rank takes part no longer. A forked process says nothing for its parent."""
    if os.getpid() == pid and _library is not None:
        _library.syncbn_shared_give_up(memory, index, -1)
        _library.syncbn_shared_unmap(memory, _size(ranks))


_channels: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel | None] = weakref.WeakKeyDictionary()
_by_name: weakref.WeakValueDictionary[str, Channel] = weakref.WeakValueDictionary()


@torch.library.custom_op("syncbn::all_sum", mutates_args=())
def _operation(x: Tensor, group: str, place: str) -> Tensor:
    """:meth:`Channel.all_sum` as an operation of torch's dispatcher, for dispatch modes; ``x`` is kept.

    Args:
        x: see there.
        group: the name of the process group.
        place: see there.
    """
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
        RuntimeError: some ranks did not come in time.
    """
    try:
        return _channels[group]
    except KeyError:
        open_channel(group)
        return _channels[group]


def open_channel(group: dist.ProcessGroup) -> None:
    """Finds out with all ranks of ``group``, once, whether they share memory, and opens a channel if they do.

    Raises:
        RuntimeError: some ranks did not come in time.
    """
    if group in _channels:
        return
    _channels[group] = None
    if group.size() == 1 or c10d.cpu_backend(group) != "gloo":
        return
    ranks = dist.get_process_group_ranks(group)
    meeting = _Meeting(group.group_name, ranks, lockstep.patience(c10d.timeout(group)))
    index = ranks.index(dist.get_rank())
    with torch_internals.without_dispatch_modes():  # which would get the first message to see
        found, why = _agreed(meeting, ranks, index)
    meeting.end()
    _channels[group] = found
    if found is not None:
        found.limit = c10d.timeout(group)
        _by_name[group.group_name] = found
    if index == 0:
        how = "share memory" if found else f"communicate through gloo: {why}"
        log.info("process group %s: ranks %s %s", group.group_name, ", ".join(map(str, ranks)), how)


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
    memory, descriptor, why = _make(len(ranks)) if index == 0 else (0, -1, "")
    try:
        said = json.loads(meeting.exchange(json.dumps([descriptor, why]))[0])
        if said[1]:
            return None, said[1]
        processes = [Process(offer["pid"], offer["started"]) for offer in offers]
        if index:
            memory, why = _open(processes[0].pid, said[0], len(ranks))
        if why := next(filter(None, meeting.exchange(why)), ""):
            return None, why
    finally:
        if descriptor != -1:
            os.close(descriptor)
    made = Channel(memory, ranks, index, processes, PROBE)
    why = next(filter(None, meeting.exchange(_probe(made, index, [offer["token"] for offer in offers]))), "")
    return (None, why) if why else (made, "")


def _offer() -> dict[str, Any]:
    """What the other ranks need to know of this one; ``why``, if it cannot share memory."""
    why = ""
    if os.environ.get("SYNCBN_SHARED_MEMORY") == "0":
        why = "SYNCBN_SHARED_MEMORY=0"
    elif _library is None:
        why = "the compiled code is missing" if sys.platform == "linux" else "this is not Linux"
    elif not hasattr(os, "memfd_create"):  # Python was built on an old system
        why = "Python has no os.memfd_create"
    try:
        space, host = (
            str(Path("/proc/self/ns/pid").readlink()),
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"),
        )
    except OSError as error:
        space, host, why = "", "", why or f"/proc cannot be read ({error.strerror})"
    return {
        "why": why,
        "host": host.strip(),
        "space": space,
        "pid": os.getpid(),
        "started": _stat(os.getpid())[1],
        "token": secrets.randbits(48),  # exact in float64
    }


def _size(ranks: int) -> int:
    assert _library is not None
    size: int = _library.syncbn_shared_size(ranks, CAPACITY)
    return size


def _make(ranks: int) -> tuple[int, int, str]:
    """The address of memory for so many ranks, and its descriptor; or why there is none.

    The memory has no name, so nothing is left when all ranks have ended.
    """
    try:
        descriptor = os.memfd_create("syncbn", os.MFD_CLOEXEC)
    except OSError as error:
        return 0, -1, f"no memory to share ({error.strerror})"
    try:
        os.posix_fallocate(descriptor, 0, _size(ranks))  # now: a page that is missing later would kill the process
        return _mapped(descriptor, ranks), descriptor, ""
    except OSError as error:
        os.close(descriptor)
        return 0, -1, f"no memory to share ({error.strerror})"


def _mapped(descriptor: int, ranks: int) -> int:
    assert _library is not None
    address: int | None = _library.syncbn_shared_map(descriptor, _size(ranks))
    if address is None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return address


def _open(pid: int, descriptor: int, ranks: int) -> tuple[int, str]:
    """The memory that another process has made. Only a process of the same user may open it."""
    try:
        with open(f"/proc/{pid}/fd/{descriptor}", "r+b", buffering=0) as file:  # noqa: PTH123  # not a path to resolve
            return _mapped(file.fileno(), ranks), ""
    except OSError as error:
        return 0, f"rank {dist.get_rank()} cannot open the memory of another rank ({error})"


def _probe(made: Channel, index: int, tokens: list[int]) -> str:
    """Why the memory is not shared; empty if a message arrives. Each rank sends the number that it told the others."""
    message = torch.zeros(len(tokens), dtype=torch.float64, device="cpu")
    message[index] = tokens[index]
    with suppress(RuntimeError):
        made.probe(message)
        if message.tolist() == tokens:
            return ""
    return f"a message from rank to rank did not arrive in the memory of rank {dist.get_rank()}"
