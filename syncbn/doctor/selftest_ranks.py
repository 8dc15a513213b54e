"""Ranks for the self-test: processes of this machine, each in a process group, with a limit to every wait."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from syncbn.doctor.machine import cores
from syncbn.training.distributed import loopback, signals
from syncbn.training.distributed.fork_server import start_tracker

GRACE = 1.0  # seconds: when a rank dies the others fail in a moment, and which came first is not what matters
STARTING, JOINING = "starting", "joining the process group"
Say = Callable[[str], None]


class Plan(NamedTuple):
    """What to run on."""

    device: str
    backend: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'}, {self.backend}"

    @property
    def where(self) -> str:
        return "GPU" if self.device == "cuda" else "CPU"

    def device_of(self, rank: int) -> torch.device:
        return torch.device(self.device, rank) if self.device == "cuda" else torch.device("cpu")


class RankError(RuntimeError):
    """A rank raised, died, or did not end in time; ``fix`` is what to try."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def on_ranks(plan: Plan, work: Callable[[int, Plan, Say], Any], timeout: float) -> list[Any]:
    """What ``work(rank, plan, say)`` gives on each rank, in a process group; ``say`` tells what it is about to do.

    Args:
        plan: how many ranks, and on what.
        work: a function of a module; its result must pickle.
        timeout: seconds until the ranks are killed.

    Raises:
        RankError: a rank raised, died, or did not end in time. No process is left.
    """
    with TemporaryDirectory(prefix="syncbn-doctor-") as place:
        ranks: list[_Rank] = []
        try:
            spawn = multiprocessing.get_context("spawn")
            start_tracker()
            for number in range(plan.ranks):
                with signals.held():  # signals are for this process, which ends the ranks
                    ranks.append(_Rank(number, plan, work, Path(place), spawn, timeout))
            _collect(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.end()
        failed = [rank for rank in ranks if rank.failure]
        if failed:  # the others fail because of the first
            raise min(failed, key=lambda rank: rank.failed_at).explain()
        late = [rank for rank in ranks if not rank.done]
        if late:
            where = "; ".join(f"rank {rank.number} was at: {rank.stage}" for rank in late)
            raise RankError(f"no end within {timeout:.1f} s; {where}", _advice(late, plan))
    return [rank.result for rank in ranks]


class _Rank:
    """One rank, seen from the process that started it."""

    def __init__(
        self, number: int, plan: Plan, work: Callable[..., Any], place: Path, spawn: SpawnContext, timeout: float
    ) -> None:
        self.number, self.plan, self.stage = number, plan, STARTING
        self.done, self.result, self.error, self.death, self.failed_at = False, None, "", "", 0.0
        self.log = place / f"rank-{number}.txt"
        self.pipe, theirs = spawn.Pipe(duplex=False)
        self.process = spawn.Process(target=_serve, args=(number, plan, work, place, theirs, timeout), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    @property
    def failure(self) -> bool:
        return bool(self.error or self.death)

    def receive(self) -> None:
        """Takes one message, or notes that there will be none."""
        try:
            kind, content = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode or 0
            self.death = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return
        if kind == "stage":
            self.stage = content
        elif kind == "error":
            self.failed_at, self.error = content  # a clock that all processes share; a death was before any of it
        else:
            self.done, self.result = True, content

    def explain(self) -> RankError:
        what = f"raised {self.error}" if self.error else self.death
        said = self.log.read_text(errors="replace", encoding="utf-8").split("\n") if self.log.exists() else []
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        tail = f"; its last line: {last[:300]}" if last and not self.error else ""
        return RankError(
            f"rank {self.number} of {self.plan.ranks} {what} (at: {self.stage}){tail}", _advice([self], self.plan)
        )

    def end(self) -> None:
        if self.done:
            self.process.join(5)  # it ends its process group
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


def _collect(ranks: Sequence[_Rank], deadline: float) -> None:
    pending = list(ranks)
    while pending and (left := deadline - time.monotonic()) > 0:
        ready = wait([rank.pipe for rank in pending], left)
        for rank in [rank for rank in pending if rank.pipe in ready]:
            rank.receive()
            if rank.failure:
                deadline = min(deadline, time.monotonic() + GRACE)
        pending = [rank for rank in pending if not (rank.done or rank.failure)]


def _advice(ranks: Sequence[_Rank], plan: Plan) -> str:
    """What to try, by how far they came."""
    if any("SIGKILL" in rank.death for rank in ranks):
        return "out of memory, perhaps: see dmesg, and the limits of the container or job"
    if any("SIGILL" in rank.death or "SIGSEGV" in rank.death for rank in ranks) and plan.device == "cpu":
        return "see whether SYNCBN_NATIVE=0 mends it, and report it"
    if all(rank.stage == STARTING for rank in ranks):
        return "torch takes long to import, or cannot be: python -c 'import torch'; more time: --timeout 300"
    if any(rank.stage == JOINING for rank in ranks):
        if plan.backend == "nccl":
            return "NCCL_DEBUG=INFO syncbn doctor says what NCCL is about"
        return (
            "processes of this machine do not find each other: see GLOO_SOCKET_IFNAME, and whether lo is up (ip link)"
        )
    return "SYNCBN_DEBUG=1 syncbn doctor names the layer where ranks differ; more time: --timeout 300"


def _serve(rank: int, plan: Plan, work: Callable[..., Any], place: Path, pipe: Connection, timeout: float) -> None:
    """A rank's life. What it prints goes into a file, for standard output is the report's."""
    log = os.open(place / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    threading.Thread(target=_leave_with_parent, daemon=True).start()

    def tell(kind: str, content: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, content)))

    try:
        tell("stage", JOINING)
        os.environ.update(loopback.within_machine())
        torch.set_num_threads(max(1, cores() // plan.ranks))
        if plan.device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            plan.backend,
            init_method=f"file://{place}/store",
            rank=rank,
            world_size=plan.ranks,
            timeout=timedelta(seconds=max(timeout, 1)),
        )
        tell("result", work(rank, plan, lambda stage: tell("stage", stage)))
        dist.destroy_process_group()
    except BaseException as error:
        tell("error", (time.monotonic(), f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))


def _leave_with_parent() -> None:
    """Ends this process when the one that started it is gone, also where a collective hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
