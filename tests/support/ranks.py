"""Tests on several processes: one pool of ranks for the whole session, and a counter of what they send.

A test asks for the fixture ``ranks`` and calls ``ranks.run(fn, *args, world_size=2)``. Nothing in here waits for ever:
a rank that raises, hangs or dies fails the test, with the traceback or the stack of every rank in the message.
"""

import faulthandler
import itertools
import json
import math
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from syncbn.nn.comm import channels, shared_gradients, shared_memory
from tests.support.warm_process import REPO, WarmProcess

SHARED = "syncbn::allreduce in shared memory, "
START = 120.0  # seconds for a rank to import torch, on a busy machine


class RankError(AssertionError):
    """A rank raised, hung or died. The message tells of every rank; ``raised`` names the exceptions by rank."""

    def __init__(self, message: str, raised: dict[int, str]) -> None:
        super().__init__(message)
        self.raised = raised


class Ranks:
    """Processes that wait for work: started when first needed, reused after, replaced as a whole after a failure.

    Args:
        grace: seconds that the others get to end by themselves, once a rank has raised or died.
        popen: starts a rank. ``subprocess.Popen`` gives each an interpreter of its own.
    """

    def __init__(self, grace: float = 5.0, popen: type[subprocess.Popen] = WarmProcess) -> None:
        self._grace, self._popen = grace, popen
        self._place = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._numbers = itertools.count()
        self._members: list[_Member] = []
        self._world_size = 0  # of the process group that the ranks hold; 0 for none that can be used again

    def run(
        self, fn: Callable[..., Any], *args: Any, world_size: int, timeout: float = 60.0, fresh: bool = False
    ) -> list[Any]:
        """Calls ``fn(rank, world_size, *args)`` on each rank, in a gloo process group, and returns the results by rank.

        Args:
            fn: a function of a module; with its arguments and results it must pickle.
            world_size: how many ranks.
            timeout: seconds until a hang is called one.
            fresh: a new process group, even where the last run left a good one of this size.

        Raises:
            RankError: a rank raised, died, or did not end in time.
        """
        __tracebackhide__ = True  # a failure is over there, not in here
        work = pickle.dumps((fn, args))
        store = None
        if fresh or world_size != self._world_size:
            store = str(self._place / f"store-{next(self._numbers)}")
        try:
            self._grow(world_size)
            members = self._members[:world_size]
            # The filters of the test: what is an error (or is not) over there is the same as over here.
            message = pickle.dumps((world_size, store, list(warnings.filters), work))
            for member in members:
                member.send(message)
            self._collect(members, timeout)
            failed = [member for member in members if member.answer is None or member.answer.error is not None]
            if failed:
                raise self._error(fn, members, timeout)
        except (
            BaseException
        ):  # an interrupt or pytest's own time limit leaves ranks that are in the middle of something
            self._kill()
            raise
        answers = [member.answer for member in members if member.answer is not None]
        self._world_size = world_size if all(answer.group_kept for answer in answers) else 0
        return [answer.result for answer in answers]

    def pids(self) -> list[int]:
        return [member.process.pid for member in self._members if member.process.pid is not None]

    def close(self) -> None:
        self._kill()
        shutil.rmtree(self._place, ignore_errors=True)

    def _grow(self, size: int) -> None:
        new = [_Member(rank, self._popen, self._place, next(self._numbers)) for rank in range(len(self._members), size)]
        self._members += new
        for member in new:
            member.await_start()

    def _collect(self, members: list["_Member"], timeout: float) -> None:
        """Waits until each member has answered or died, or for as long as there is hope that it will."""
        deadline = time.monotonic() + timeout
        for member in members:
            member.answer = None
        pending = set(members)
        while pending and (left := deadline - time.monotonic()) > 0:
            ready = wait([member.pipe for member in pending], left)
            for member in [member for member in pending if member.pipe in ready]:
                pending.discard(member)
                member.receive()
                if member.answer is None or member.answer.error is not None:
                    deadline = min(deadline, time.monotonic() + self._grace)

    def _error(self, fn: Callable[..., Any], members: list["_Member"], timeout: float) -> RankError:
        parts, raised = [], {}
        stacks = {member: member.stacks() for member in members if member.answer is None and member.death() is None}
        for member in members:
            answer, name = member.answer, f"rank {member.rank}"
            if member in stacks:
                parts.append(f"{name} did not end (limit {timeout:g} s, or {self._grace:g} s after another failed); "
                             f"its stacks:\n{stacks[member]}")  # fmt: skip
            elif answer is None:
                parts.append(f"{name} died: {member.death()}")
            elif answer.error is None:
                parts.append(f"{name} ended well")
            else:
                raised[member.rank] = answer.error
                parts.append(f"{name} raised {answer.error}\n{answer.traceback}")
        return RankError(f"{fn.__module__}.{fn.__qualname__} on {len(members)} ranks\n" + "\n\n".join(parts), raised)

    def _kill(self) -> None:
        members, self._members, self._world_size = self._members, [], 0
        for member in members:
            member.process.kill()
        for member in members:
            member.close()


class _Answer(NamedTuple):
    """What a rank sends back."""

    result: Any = None
    error: str | None = None
    traceback: str = ""
    group_kept: bool = False


class _Member:
    """One rank, seen from the test's process."""

    def __init__(self, rank: int, popen: type[subprocess.Popen], place: Path, number: int) -> None:
        self.rank = rank
        self.answer: _Answer | None = None
        self._stacks = place / f"stacks-{number}"
        self.pipe, theirs = Pipe()
        command = [sys.executable, "-m", "tests.support.pool_rank", str(rank), str(self._stacks)]
        self.process = popen(command, stdin=theirs.fileno(), cwd=REPO)
        theirs.close()  # so that the end of the process is the end of the pipe

    def await_start(self) -> None:
        if not self.pipe.poll(START):
            raise RankError(f"rank {self.rank} did not start within {START:g} s", {})
        self.receive()
        if self.answer is None:
            raise RankError(f"rank {self.rank} died at its start: {self.death()}", {})

    def send(self, message: bytes) -> None:
        try:
            self.pipe.send_bytes(message)
        except OSError as error:  # it died between two runs
            raise RankError(f"rank {self.rank} died while it had nothing to do: {self.death()}", {}) from error

    def receive(self) -> None:
        try:
            self.answer = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.answer = None
            self.process.wait(5)

    def death(self) -> str | None:
        code = self.process.poll()
        if code is None:
            return None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def stacks(self) -> str:
        """The stacks of all its threads, dumped by its signal handler even where it hangs in native code."""
        os.kill(self.process.pid, signal.SIGUSR1)
        text, deadline = "", time.monotonic() + 3
        while time.monotonic() < deadline:
            before, text = text, self._stacks.read_text(encoding="utf-8")
            if text and text == before:
                return text
            time.sleep(0.1)
        return text or "(none to be had)"

    def close(self) -> None:
        self.process.wait(10)
        self.pipe.close()


def serve(rank: int, pipe: Connection, stacks: str) -> None:
    """A rank's life: take work, do it, answer, until the pipe ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test's process, which then kills this one
    threading.Thread(target=_leave_with, args=(pipe.fileno(),), daemon=True).start()
    with Path(stacks).open("w", encoding="utf-8") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        answer = _Answer()
        while True:
            try:
                pipe.send_bytes(pickle.dumps(answer))
                work = pipe.recv_bytes()
            except (EOFError, OSError):
                return
            answer = _do(rank, work)


def _leave_with(pipe: int) -> None:
    """Ends this process when the test's process is gone, killed perhaps, also where a collective hangs."""
    watch = select.poll()
    watch.register(pipe, 0)  # its other end is closed: the one event that cannot be left out
    watch.poll()
    os._exit(1)


def _do(rank: int, message: bytes) -> _Answer:
    try:
        world_size, store, filters, work = pickle.loads(message)
        fn, args = pickle.loads(work)
        if store is not None:
            if dist.is_initialized():
                dist.destroy_process_group()
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            dist.barrier()  # a rank that left its group at once would close connections that another is still making
        world = dist.group.WORLD
        with warnings.catch_warnings():
            _set_filters(filters)
            result = fn(rank, world_size, *args)
        answer = _Answer(result, group_kept=dist.group.WORLD is world)
        pickle.dumps(answer)  # what cannot be sent is the rank's failure too
    except BaseException as error:  # pytest.fail and SystemExit are failures like any other
        return _Answer(error=type(error).__name__, traceback=traceback.format_exc())
    return answer


def _set_filters(filters: list[tuple[Any, ...]]) -> None:
    warnings.resetwarnings()
    for action, message, category, module, line in reversed(filters):
        patterns = (getattr(pattern, "pattern", pattern) or "" for pattern in (message, module))
        warnings.filterwarnings(action, next(patterns), category, next(patterns), line)


@dataclass
class Messages:
    """What was sent: the operations by c10d's own names, and the shape and type of each payload by gloo's record."""

    operations: list[str] = field(default_factory=list)
    payloads: list[tuple[str, list[int], str]] = field(default_factory=list)
    shared: int = 0  # calls through shared memory
    averaged: int = 0  # buckets of gradients, through shared memory

    def __len__(self) -> int:
        return len(self.operations)


def _let_threads_finish() -> None:
    """Waits until this process's other threads sleep.

    gloo's thread lets the caller go on first and notes the end of its message in the profile then. Where the profile
    has ended by that time, it has crashed the process.
    """
    quiet = 0
    for _ in range(2000):
        try:
            states = [
                stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0]
                for stat in Path("/proc/self/task").glob("*/stat")
            ]
        except OSError:  # a thread has just ended
            continue
        quiet = quiet + 1 if states.count("R") <= 1 else 0
        if quiet == 3:
            return
        time.sleep(0.001)


def _shared_calls() -> dict[shared_memory.Channel, int]:
    """How often this rank has arrived in the memory of each of its groups, by what stands in that memory."""
    found = list(filter(None, channels._channels.values()))
    return {each: each._library.syncbn_shared_arrived(each._address, each._index) for each in found}


@contextmanager
def messages() -> Iterator[Messages]:
    """Counts this rank's messages within the context. The count is there when the context has ended.

    They are read from torch's profiler: whatever goes through a process group, a collective of any kind or a send, is
    an operation ``c10d::*`` of the dispatcher. No code under test can leave it out or count it twice. What goes through
    shared memory the layer shows there itself, so that is compared with the calls that the memory has seen.
    """
    seen, before = Messages(), _shared_calls()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        yield seen
        _let_threads_finish()
    for event in profiler.profiler.kineto_results.events():
        if event.name().startswith("c10d::"):
            seen.operations.append(event.name().removeprefix("c10d::").strip("_"))
        elif event.name().startswith("gloo:"):
            shape, dtype = next(zip(event.shapes(), event.dtypes(), strict=True), ([], ""))
            seen.payloads.append((event.name().removeprefix("gloo:"), shape, dtype))
        elif event.name().startswith(SHARED):
            shape, dtype = event.name().removeprefix(SHARED).split(" of ")
            seen.operations.append("allreduce")
            seen.payloads.append(("all_reduce", json.loads(shape), dtype))
            seen.shared += -(-math.prod(json.loads(shape)) // shared_memory.CAPACITY)
        elif event.name().startswith(shared_gradients.OPERATION):
            seen.averaged += 1
    # The first call of a new channel is its probe.
    assert seen.shared == sum(calls - before.get(channel, 1) for channel, calls in _shared_calls().items())
