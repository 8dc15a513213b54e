"""Which rank the others wait for, where nobody watches the ranks: under torchrun and srun.

A rank that fails leaves a word in the launcher's store. One that has waited for another in vain looks for the words of
all, and names the ranks that have left none. Every wait is bounded, also where the store's machine is gone.
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

PATIENCE = 5.0  # seconds for the words of the others, who give up at about the same time
LINGER = 1.0  # seconds that the store outlives its own rank's last look, so that the others have theirs
LOST = ("Connection closed", "Connection reset", "Broken pipe", "No route to host", "pair closure")
WAITED = "waited in vain"


def is_timeout(message: str) -> bool:
    """Whether a rank that says this has waited too long for another; a user's own time-outs are another thing."""
    message = message.lower()
    return any(w in message for w in ("timed out", "timeout")) and any(w in message for w in ("gloo", "nccl", "store"))


def introduce() -> None:
    """Leaves this rank's host in the store, for when it no longer answers. All ranks do, before any collective."""
    if _is_alone():
        return
    _say(store.connect(store.START), "hosts", environment.host())


def leave_word(error: BaseException) -> None:
    """Tells the others how this rank ends. At once: what a rank does before it ends may take longer than they wait.

    Args:
        error: what ends it.
    """
    if _is_alone() or isinstance(error, Stopped | AgreedError):  # those end all ranks alike
        return
    word = WAITED if _waited(error) else f"failed: {type(error).__name__}"
    _within(PATIENCE, lambda: _say(_connect(), "ends", word))


def to_blame(error: Exception, timeout: float) -> str:
    """Which ranks this one has waited for in vain, with the host of each; empty for any other error.

    Takes :data:`PATIENCE` seconds, or less where all ranks have left their words.

    Args:
        error: what ended this rank.
        timeout: of a collective, in seconds.
    """
    if _is_alone() or not _waited(error):
        return ""
    hosts: dict[int, str] = {}
    words: dict[int, str] = {}
    _within(PATIENCE + 1, lambda: _listen(hosts, words))
    if environment.launcher() == "srun" and environment.rank() == 0:
        time.sleep(LINGER)
    if not words:
        by = "rank 0" if environment.launcher() == "srun" else "torchrun"
        return f"{by} on {os.environ['MASTER_ADDR']}, which has the store, cannot be reached"
    failed = [rank for rank, word in words.items() if word != WAITED]
    if failed:
        return "; ".join(f"{_named([rank], hosts)} {words[rank]}" for rank in sorted(failed)[:4])
    silent = [rank for rank in range(_world_size()) if rank not in words and rank != environment.rank()]
    if not silent:
        return "all ranks have waited, none is silent: a link between them, or they are out of step (SYNCBN_DEBUG=1)"
    within = f" within {timeout:g} s, timeouts.collective" if is_timeout(str(error)) else ""
    return f"no word from {_named(silent, hosts)}{within}"


def _is_alone() -> bool:
    """Whether there is nobody to wait for, or train.py itself watches the ranks."""
    return environment.launcher() is None or _world_size() == 1


def _world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def _waited(error: BaseException) -> bool:
    """Whether a collective of this rank came to nothing because of another rank."""
    return isinstance(error, RuntimeError) and (is_timeout(str(error)) or any(word in str(error) for word in LOST))


def _listen(hosts: dict[int, str], words: dict[int, str]) -> None:
    """Takes in what the store has, until all ranks have left a word, or one has that explains the others."""
    deadline = time.monotonic() + PATIENCE
    client = _connect()
    hosts |= _said(client, "hosts")
    while True:  # each look counts: the store may be gone at the next
        words |= _said(client, "ends")
        explained = any(word != WAITED for word in words.values())
        if explained or len(words) == _world_size() or time.monotonic() > deadline:
            return
        time.sleep(0.2)


def _connect() -> Any:
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    socket.create_connection(address, timeout=PATIENCE).close()  # torch's client tries on and on, and prints
    return store.connect(PATIENCE)


def _say(client: Any, key: str, word: str) -> None:
    client.append(store.of_this_attempt(key), f"{environment.rank()} {word}\n")  # all in one: one look reads them


def _said(client: Any, key: str) -> dict[int, str]:
    """What each rank has said, by rank."""
    lines = client.get(store.of_this_attempt(key)).decode().splitlines()
    return {int(rank): word for rank, word in (line.split(" ", 1) for line in lines)}


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Does it in a thread, and leaves it alone with it after so long: a store's client may wait for ever, whatever its
    time-out, where the connection stands and nobody answers.
    """

    def quietly() -> None:
        with suppress(OSError, RuntimeError):  # no store, which is found by what is missing then
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
