"""The all-reduce of ranks on one host, through memory that they share: 30 microseconds where gloo takes a millisecond.

:mod:`syncbn.nn.comm.channels` decides which groups have such a channel. The protocol is in
``kernels/shared_memory.c``.
"""

import ctypes
import errno
import os
import threading
import time
import weakref
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn import native, torch_internals

CAPACITY = 8192  # numbers per call; a longer tensor takes several calls
SLICE = 200_000_000  # nanoseconds between two checks that the missing ranks are alive
SPINS = 2000  # about 50 µs; a rank that comes within that time costs no system call
_PLACE, _BYTES = 240, 8  # bytes of a place, as in shared_memory.c, and of a number
_NOTHING = nullcontext()
_DONE, _LATE, _OUT_OF_STEP, _GIVEN_UP = range(4)


class Process(NamedTuple):
    """A process of this host: its id, and when it started, in the kernel's ticks; an id is used again."""

    pid: int
    started: str

    def lives(self) -> bool:
        """Whether it is running; a zombie, which its parent has not reaped yet, counts as ended."""
        state, started = stat(self.pid)
        return started == self.started and state not in "ZX"


def stat(pid: int) -> tuple[str, str]:
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


library = _load()


class Channel:
    """The memory that the ranks of a group share, for one of them.

    Args:
        memory: its address; :func:`size` bytes, zeros at first.
        ranks: the global ranks of the group.
        index: this rank's place among them.
        processes: of all ranks.
        limit: the group's time-out.
    """

    def __init__(self, memory: int, ranks: list[int], index: int, processes: list[Process], limit: timedelta) -> None:
        assert library is not None
        self.limit = limit
        self._ranks, self._index, self.processes = ranks, index, processes
        self._address = memory
        self._at = (memory, len(ranks), CAPACITY, index)
        self._call = 0
        self._broken = ""  # the error after which ranks may be out of step
        self._lock = threading.Lock()
        # Where ranks outnumber the cores, a rank that spins keeps the core from the rank that it waits for.
        self._spins = SPINS if len(ranks) <= len(os.sched_getaffinity(0)) else 0
        self._library = library
        self._pid = os.getpid()
        weakref.finalize(self, _leave, memory, len(ranks), index, self._pid)

    def takes(self, x: Tensor) -> bool:
        """Whether it sends this tensor; a forked process has no part in the group of its parent."""
        plain = type(x) is Tensor and x.dtype is torch.float64 and x.is_cpu and x.is_contiguous()
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
        with self._lock, _profiled(x) if torch_internals.profiler_is_active() else _NOTHING:
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
        """A test all-reduce, when the channel is opened; if it fails, the channel is not used."""
        self._send(message.data_ptr(), message.numel(), b"the first message")

    def _send(self, values: int, numbers: int, place: bytes) -> None:
        if numbers <= CAPACITY:
            self._exchange(values, numbers, 0, numbers, place)
            return
        for start in range(0, numbers, CAPACITY):
            count = min(CAPACITY, numbers - start)
            self._exchange(values + start * _BYTES, count, start, numbers, place)

    def _exchange(self, values: int, count: int, start: int, numbers: int, place: bytes) -> None:
        self._call = call = (self._call + 1) % 2**32
        at = (*self._at, call)
        code = self._library.syncbn_shared_all_sum(*at, values, count, start, numbers, place, self._spins, SLICE)
        if code == _DONE:
            return
        deadline = time.monotonic() + self.limit.total_seconds()
        while code == _LATE:
            self._check_others(call, deadline)
            code = self._library.syncbn_shared_receive(*at, values, count, 0, SLICE)
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
            if self.processes[blamed].lives():
                raise RuntimeError(self._late([blamed]))
            raise RuntimeError(f"shared memory: {self._named([blamed])} has ended")

    def _missing(self, call: int) -> list[int]:
        """The places of the ranks that have not arrived for this call."""
        indices = range(len(self._ranks))
        return [i for i in indices if self._library.syncbn_shared_arrived(self._address, i) != call]

    def _check_others(self, call: int, deadline: float) -> None:
        """Raises RuntimeError if a rank that has not arrived has ended, or the time is up."""
        ended = [i for i in self._missing(call) if not self.processes[i].lives()]
        # One may have arrived between the two checks, and ended after that.
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
    """Shows the all-reduce in torch's profiler, which records those of process groups only."""
    return torch.profiler.record_function(f"syncbn::allreduce in shared memory, {list(x.shape)} of double")


def _leave(memory: int, ranks: int, index: int, pid: int) -> None:
    """Marks this rank as gone for the others. A forked process does not do that for its parent."""
    if os.getpid() == pid and library is not None:
        library.syncbn_shared_give_up(memory, index, -1)
        unmap(memory, size(ranks))


def size(ranks: int) -> int:
    """Bytes of memory for so many ranks."""
    assert library is not None
    found: int = library.syncbn_shared_size(ranks, CAPACITY)
    return found


def make_memory(size: int) -> tuple[int, int, str]:
    """The address of so many bytes of memory, and its descriptor; or why there is none.

    The memory has no name, so nothing is left when all ranks have ended.
    """
    try:
        descriptor = os.memfd_create("syncbn", os.MFD_CLOEXEC)
    except OSError as error:
        return 0, -1, f"no memory to share ({error.strerror})"
    try:
        os.posix_fallocate(descriptor, 0, size)  # now: a page that is missing later would kill the process
        return _mapped(descriptor, size), descriptor, ""
    except OSError as error:
        os.close(descriptor)
        return 0, -1, f"no memory to share ({error.strerror})"


def _mapped(descriptor: int, size: int) -> int:
    assert library is not None
    address: int | None = library.syncbn_shared_map(descriptor, size)
    if address is None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return address


def open_memory(pid: int, descriptor: int, size: int) -> tuple[int, str]:
    """The memory that another process has made. Only a process of the same user may open it."""
    try:
        with open(f"/proc/{pid}/fd/{descriptor}", "r+b", buffering=0) as file:  # noqa: PTH123  # not a path to resolve
            return _mapped(file.fileno(), size), ""
    except OSError as error:
        return 0, f"rank {dist.get_rank()} cannot open the memory of another rank ({error})"


def unmap(memory: int, size: int) -> None:
    """Gives memory back; 0 for none."""
    if library is not None and memory:
        library.syncbn_shared_unmap(memory, size)
