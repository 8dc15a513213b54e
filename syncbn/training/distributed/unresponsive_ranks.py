"""Finds the unresponsive rank under torchrun and srun, where no launcher of ours monitors the ranks.

A rank that fails writes a report to the launcher's store. A rank whose collective timed out reads the reports of all
ranks and names those that have written none. Every wait is bounded, even if the machine of the store is gone.

Under ``python train.py`` the launcher sees which rank is silent (``rank_processes``), and ``launch.outcome`` names it.
"""

import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from syncbn.training.distributed import environment, store
from syncbn.training.distributed.signals import Stopped
from syncbn.training.errors import AgreedError

PATIENCE = 5.0  # seconds to wait for the reports of the other ranks, which time out at about the same time
LINGER = 1.0  # seconds that rank 0 keeps the store alive after it has read the reports, so that others can read them
# In an error message: another rank is gone. The last is of syncbn.nn.comm.shared_memory.
LOST = ("Connection closed", "Connection reset", "Broken pipe", "No route to host", "pair closure", "shared memory: ")
WAITED = "waited in vain"


def is_timeout(message: str) -> bool:
    """Whether an error message is of a collective or store that timed out, and not of a time-out in the user's code."""
    message = message.lower()
    # gloo's "Application timeout caused pair closure" does not name gloo.
    by_whom = ("gloo", "pair closure", "nccl", "store", "shared memory")
    return any(w in message for w in ("timed out", "timeout")) and any(w in message for w in by_whom)


def register_host() -> None:
    """Writes this rank's host to the store, to name it if the rank no longer responds. Called before any collective."""
    if not _is_disabled():
        _append(store.connect(store.START), "hosts", environment.host())


def report_failure(error: BaseException) -> None:
    """Writes to the store how this rank ends, for the other ranks.

    To be called at once: the other ranks wait :data:`PATIENCE` seconds for reports, and a rank may take longer to clean
    up.
    """
    if _is_disabled() or isinstance(error, Stopped | AgreedError):  # all ranks raise these
        return
    report = WAITED if _waited(error) else f"failed: {type(error).__name__}"
    _run_within(PATIENCE, lambda: _append(_connect(), "ends", report))


def find_unresponsive(error: Exception, timeout: float) -> str:
    """Names the ranks that this rank waited for in vain, each with its host.

    Takes :data:`PATIENCE` seconds, or less if all ranks have reported. ``timeout`` is that of a collective, in seconds.

    Returns:
        A part of an error line; empty if the error is not that of a collective that another rank left.
    """
    if _is_disabled() or not _waited(error):
        return ""
    hosts: dict[int, str] = {}
    reports: dict[int, str] = {}
    _run_within(PATIENCE + 1, lambda: _read_reports(hosts, reports))
    if environment.launcher() == "srun" and environment.rank() == 0:
        time.sleep(LINGER)
    if not reports:
        by = "rank 0" if environment.launcher() == "srun" else "torchrun"
        return f"{by} on {os.environ['MASTER_ADDR']}, which has the store, cannot be reached"
    failed = [rank for rank, report in reports.items() if report != WAITED]
    if failed:
        return "; ".join(f"{_named([rank], hosts)} {reports[rank]}" for rank in sorted(failed)[:4])
    silent = [rank for rank in range(_world_size()) if rank not in reports and rank != environment.rank()]
    if not silent:
        return "all ranks timed out, all respond: a link between them failed, or they are out of step (SYNCBN_DEBUG=1)"
    within = f" within {timeout:g} s, timeouts.collective" if is_timeout(str(error)) else ""
    return f"no response from {_named(silent, hosts)}{within}"


def _is_disabled() -> bool:
    """Whether there is no other rank to wait for, or the launcher of ``train.py`` monitors the ranks."""
    return environment.launcher() is None or _world_size() == 1


def _world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def _waited(error: BaseException) -> bool:
    """Whether a collective of this rank failed because another rank did not respond or closed the connection."""
    return isinstance(error, RuntimeError) and (is_timeout(str(error)) or any(word in str(error) for word in LOST))


def _read_reports(hosts: dict[int, str], reports: dict[int, str]) -> None:
    """Reads the store until all ranks have reported, one has reported its own failure, or time is up.

    The arguments are updated in place, so that the caller has what was read before the store was gone.
    """
    deadline = time.monotonic() + PATIENCE
    client = _connect()
    hosts |= _read(client, "hosts")
    while True:
        reports |= _read(client, "ends")
        explained = any(report != WAITED for report in reports.values())
        if explained or len(reports) == _world_size() or time.monotonic() > deadline:
            return
        time.sleep(0.2)


def _connect() -> Any:
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    # A plain socket first: torch's client retries a refused connection many times and prints each attempt.
    socket.create_connection(address, timeout=PATIENCE).close()
    return store.connect(PATIENCE)


def _append(client: Any, key: str, text: str) -> None:
    # All ranks append to one key, so that one request reads the lines of all.
    client.append(store.of_this_attempt(key), f"{environment.rank()} {text}\n")


def _read(client: Any, key: str) -> dict[int, str]:
    """The lines that the ranks have appended to this key, by rank."""
    lines = client.get(store.of_this_attempt(key)).decode().splitlines()
    return {int(rank): text for rank, text in (line.split(" ", 1) for line in lines)}


def _run_within(seconds: float, work: Callable[[], None]) -> None:
    """Runs ``work`` in a thread and abandons the thread after this time.

    The time-out of a store's client is not enough: the client may wait for ever if the connection is open and the
    server does not answer.
    """

    def quietly() -> None:
        with suppress(OSError, RuntimeError):  # no store: the caller finds no reports
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def _named(ranks: list[int], hosts: dict[int, str]) -> str:
    """``rank 1 on a, rank 2, 3 on b``."""
    on: dict[str, list[str]] = defaultdict(list)
    for rank in ranks:
        on[hosts.get(rank, "a host that is not known")].append(str(rank))
    places = [f"rank {', '.join(numbers)} on {host}" for host, numbers in on.items()]
    return ", ".join(places[:8]) + (f" and those of {len(places) - 8} more hosts" if len(places) > 8 else "")
