"""Starts and monitors the rank processes of the self-test, with a time limit on every wait.

They are not those of syncbn.training.processes.rank_processes. Its constructor opens a TCPStore on the loopback
interface, and with that interface down torch 2.13 retries for 300 s before a rank starts. The self-test has to report
that case within its own limit, so it uses a file store. It also needs results and stages from its ranks.
"""

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
from syncbn.training.processes.fork_server import start_tracker

GRACE = 1.0  # seconds for the other ranks to report errors after one has failed; they usually fail because of it
STARTING, JOINING = "starting", "joining the process group"
ReportStage = Callable[[str], None]


class Place(NamedTuple):
    """Device type, backend and number of ranks of a self-test."""

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
    """A rank raised, died, or did not end in time; ``fix`` is the suggested action."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def on_ranks(place: Place, work: Callable[[int, Place, ReportStage], Any], timeout: float) -> list[Any]:
    """Run ``work(rank, place, report_stage)`` on each rank of a process group, and return the results by rank.

    Args:
        place: number of ranks, device and backend.
        work: a function of a module, whose result can be pickled. It calls ``report_stage`` with a name before each
            stage, for error messages.
        timeout: seconds until the ranks are killed.

    Raises:
        RankError: a rank raised, died, or did not end in time. No process is left running.
    """
    with TemporaryDirectory(prefix="syncbn-doctor-") as directory:
        ranks: list[_Rank] = []
        try:
            spawn = multiprocessing.get_context("spawn")
            start_tracker()
            for number in range(place.ranks):
                with signals.held():  # ranks inherit blocked signals; this process handles signals and ends the ranks
                    ranks.append(_Rank(number, place, work, Path(directory), spawn, timeout))
            _collect(ranks, time.monotonic() + timeout)
        finally:
            for rank in ranks:
                rank.end()
        failed = [rank for rank in ranks if rank.failure]
        if failed:  # report the first failure, which caused the others
            raise min(failed, key=lambda rank: rank.failed_at).explain()
        late = [rank for rank in ranks if not rank.done]
        if late:
            where = "; ".join(f"rank {rank.number} was at: {rank.stage}" for rank in late)
            raise RankError(f"not finished within {timeout:.1f} s; {where}", _advice(late, place))
    return [rank.result for rank in ranks]


class _Rank:
    """State of one rank in the process that started it."""

    def __init__(
        self, number: int, place: Place, work: Callable[..., Any], directory: Path, spawn: SpawnContext, timeout: float
    ) -> None:
        self.number, self.place, self.stage = number, place, STARTING
        self.done, self.result, self.error, self.death, self.failed_at = False, None, "", "", 0.0
        self.log = directory / f"rank-{number}.txt"
        self.pipe, theirs = spawn.Pipe(duplex=False)
        arguments = (number, place, work, directory, theirs, timeout)
        self.process = spawn.Process(target=_run_rank, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # otherwise recv_bytes would not raise EOFError when the process ends

    @property
    def failure(self) -> bool:
        return bool(self.error or self.death)

    def receive(self) -> None:
        """Receive one report of the rank, or record its death if the pipe has ended."""
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
            # time.monotonic() is the same clock in all processes. The failed_at of a death stays 0, before any error.
            self.failed_at, self.error = content
        else:
            self.done, self.result = True, content

    def explain(self) -> RankError:
        """The error that reports the failure of this rank."""
        failure = f"raised {self.error}" if self.error else self.death
        lines = self.log.read_text(errors="replace", encoding="utf-8").split("\n") if self.log.exists() else []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        tail = f"; its last line: {last[:300]}" if last and not self.error else ""
        return RankError(
            f"rank {self.number} of {self.place.ranks} {failure} (at: {self.stage}){tail}", _advice([self], self.place)
        )

    def end(self) -> None:
        """End the process, if necessary by SIGKILL."""
        if self.done:
            self.process.join(5)  # it is still destroying its process group
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


def _collect(ranks: Sequence[_Rank], deadline: float) -> None:
    """Receive reports until every rank is done or has failed, or the deadline has passed."""
    pending = list(ranks)
    while pending and (left := deadline - time.monotonic()) > 0:
        ready = wait([rank.pipe for rank in pending], left)
        for rank in [rank for rank in pending if rank.pipe in ready]:
            rank.receive()
            if rank.failure:
                deadline = min(deadline, time.monotonic() + GRACE)
        pending = [rank for rank in pending if not (rank.done or rank.failure)]


def _advice(ranks: Sequence[_Rank], place: Place) -> str:
    """The suggested action, by the cause of death or the stage of these ranks."""
    if any("SIGKILL" in rank.death for rank in ranks):
        return "possibly out of memory: check dmesg, and the limits of the container or job"
    if any("SIGILL" in rank.death or "SIGSEGV" in rank.death for rank in ranks) and place.device == "cpu":
        return "check whether SYNCBN_NATIVE=0 helps, and report it"
    if all(rank.stage == STARTING for rank in ranks):
        return "importing torch is slow or fails: try python -c 'import torch'; for more time: --timeout 300"
    if any(rank.stage == JOINING for rank in ranks):
        if place.backend == "nccl":
            return "run NCCL_DEBUG=INFO syncbn doctor to see what NCCL waits for"
        return (
            "processes on this machine cannot connect to each other: check GLOO_SOCKET_IFNAME, and whether lo is up "
            "(ip link)"
        )
    return "run SYNCBN_DEBUG=1 syncbn doctor to see the layer where ranks differ; for more time: --timeout 300"


def _run_rank(
    rank: int, place: Place, work: Callable[..., Any], directory: Path, pipe: Connection, timeout: float
) -> None:
    """Run ``work`` in the process of a rank, and report stages, the result or the error through the pipe.

    The output of the rank goes to a file, because stdout may be the JSON report.
    """
    log = os.open(directory / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def report(kind: str, content: Any) -> None:
        pipe.send_bytes(pickle.dumps((kind, content)))

    try:
        report("stage", JOINING)
        os.environ.update(loopback.within_machine())
        torch.set_num_threads(max(1, cores() // place.ranks))
        if place.device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            place.backend,
            init_method=f"file://{directory}/store",
            rank=rank,
            world_size=place.ranks,
            timeout=timedelta(seconds=max(timeout, 1)),
        )
        report("result", work(rank, place, lambda stage: report("stage", stage)))
        dist.destroy_process_group()
    except BaseException as error:
        report("error", (time.monotonic(), f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))


def _exit_with_parent() -> None:
    """End this process when its parent has died, even if a collective hangs in the main thread."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
