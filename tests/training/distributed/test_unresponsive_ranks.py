"""Ranks that fail under torchrun or srun find out which of them is silent, over a real store."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from unittest import mock

import pytest
from torch.distributed import TCPStore

from syncbn.training.distributed import environment, slurm, unresponsive_ranks
from syncbn.training.errors import AgreedError

TIMEOUT = RuntimeError("[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 7000ms for recv")
LOST = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:4711")
NOBODY = "all ranks timed out, all respond: a link between them failed, or they are out of step (SYNCBN_DEBUG=1)"
ENVIRONMENT = {"TORCHELASTIC_RUN_ID": "a", "MASTER_ADDR": "127.0.0.1"}
SERVER = """
import time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(120)
"""


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen, int]]:
    """A process that has the store, and its port."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def be(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, port: int, patience: float = 1.0) -> None:
    """From now on this process is that rank, one of two on its node."""
    for name, value in (ENVIRONMENT | {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(environment, "host", lambda: f"node{rank // 2}")
    monkeypatch.setattr(unresponsive_ranks, "PATIENCE", patience)


def test_silent_ranks_are_named_with_their_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(7):
        be(monkeypatch, rank, 7, store.port)
        unresponsive_ranks.register_host()
    for rank in (0, 1, 4, 6):
        be(monkeypatch, rank, 7, store.port)
        unresponsive_ranks.report_failure(TIMEOUT)
    them = "no response from rank 2, 3 on node1, rank 5 on node2"
    assert unresponsive_ranks.find_unresponsive(TIMEOUT, 7.0) == f"{them} within 7 s, timeouts.collective"
    assert unresponsive_ranks.find_unresponsive(LOST, 7.0) == them


def test_a_rank_that_failed_by_itself_is_not_called_silent_and_explains_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank in range(3):
        be(monkeypatch, rank, 3, store.port, patience=20)
        unresponsive_ranks.register_host()
    for rank, error in ((1, KeyError("a")), (0, LOST)):
        be(monkeypatch, rank, 3, store.port, patience=20)
        unresponsive_ranks.report_failure(error)
    begin = time.monotonic()
    assert unresponsive_ranks.find_unresponsive(LOST, 7.0) == "rank 1 on node0 failed: KeyError"
    assert time.monotonic() - begin < 15


def give_up(rank: int, world_size: int, port: int, late: float) -> tuple[str, float]:
    """What this rank says, and after how long; the last gives up late."""
    variables = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    with mock.patch.dict(os.environ, ENVIRONMENT | variables), mock.patch.object(unresponsive_ranks, "PATIENCE", 20.0):
        unresponsive_ranks.register_host()
        time.sleep(late if rank == world_size - 1 else 0)
        begin = time.monotonic()
        unresponsive_ranks.report_failure(TIMEOUT)
        return unresponsive_ranks.find_unresponsive(TIMEOUT, 7.0), time.monotonic() - begin


def test_ranks_that_all_wait_are_none_of_them_silent_and_wait_no_longer(ranks) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = ranks.run(give_up, store.port, 2.0, world_size=3)
    assert [line for line, _ in said] == [NOBODY] * 3
    assert max(seconds for _, seconds in said) < 15


@pytest.mark.parametrize(("rank", "stays"), [(0, True), (1, False)])
def test_under_srun_the_rank_that_has_the_store_stays_for_the_looks_of_others(
    monkeypatch: pytest.MonkeyPatch, rank: int, stays: bool
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(environment, "launcher", lambda: "srun")
    monkeypatch.setattr(slurm, "join", lambda: None)
    monkeypatch.setattr(unresponsive_ranks, "LINGER", 3.0)
    for each in (1 - rank, rank):
        be(monkeypatch, each, 2, store.port)
        unresponsive_ranks.register_host()
        unresponsive_ranks.report_failure(TIMEOUT)
    begin = time.monotonic()
    assert unresponsive_ranks.find_unresponsive(TIMEOUT, 7.0) == NOBODY
    assert (time.monotonic() - begin > 3) == stays


@pytest.mark.parametrize("how", ["ended", "stopped"])
def test_a_store_that_cannot_be_reached_is_named_in_time(
    monkeypatch: pytest.MonkeyPatch, server: tuple[subprocess.Popen, int], how: str
) -> None:
    process, port = server
    be(monkeypatch, 1, 2, port)
    unresponsive_ranks.register_host()
    process.send_signal(signal.SIGKILL if how == "ended" else signal.SIGSTOP)
    time.sleep(0.2)
    begin = time.monotonic()
    unresponsive_ranks.report_failure(TIMEOUT)
    assert (
        unresponsive_ranks.find_unresponsive(TIMEOUT, 7.0)
        == "torchrun on 127.0.0.1, which has the store, cannot be reached"
    )
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_what_was_heard_before_the_store_was_gone_counts(
    monkeypatch: pytest.MonkeyPatch, server: tuple[subprocess.Popen, int], how: int
) -> None:
    process, port = server
    for rank in range(3):
        be(monkeypatch, rank, 3, port, patience=4)
        unresponsive_ranks.register_host()
    for rank in (0, 2):
        be(monkeypatch, rank, 3, port, patience=4)
        unresponsive_ranks.report_failure(LOST)
    threading.Timer(1.0, process.send_signal, [how]).start()
    begin = time.monotonic()
    assert unresponsive_ranks.find_unresponsive(LOST, 7.0) == "no response from rank 1 on node0"
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize(
    "error",
    [
        ValueError("my store: Timed out"),
        BrokenPipeError("Broken pipe"),
        RuntimeError("[gloo/transport/tcp/pair.cc] op.preamble.length <= op.nbytes. 16 vs 8"),
    ],
)
def test_other_errors_have_nobody_else_to_blame(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    be(monkeypatch, 0, 2, 1)
    monkeypatch.setattr(unresponsive_ranks, "_run_within", lambda *_: None)
    assert unresponsive_ranks.find_unresponsive(error, 7.0) == ""


@pytest.mark.parametrize("alone", ["one rank", "watched by train.py", "agreed"])
def test_where_there_is_nobody_to_tell_the_store_is_left_alone(monkeypatch: pytest.MonkeyPatch, alone: str) -> None:
    be(monkeypatch, 0, 1 if alone == "one rank" else 2, 1)
    if alone == "watched by train.py":
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    calls = []
    monkeypatch.setattr(unresponsive_ranks, "_run_within", lambda *_: calls.append(1))
    if alone == "agreed":
        unresponsive_ranks.report_failure(AgreedError("a", 1, "no"))
    else:
        unresponsive_ranks.register_host()
        unresponsive_ranks.report_failure(TIMEOUT)
        assert unresponsive_ranks.find_unresponsive(TIMEOUT, 7.0) == ""
    assert calls == []


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        ("[gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 5000ms for recv operation to complete", True),
        ("Application timeout caused pair closure", True),  # gloo's, as an error line shows it
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 5000 milliseconds", True),
        ("Timed out in shared memory: rank 1 did not come within 5 s", True),
        ("wait timeout after 5000ms, keys: /store/a", True),
        ("HTTP request timed out", False),
        ("Connection closed by peer [127.0.0.1]:1", False),
    ],
)
def test_the_time_outs_of_collectives_are_told_from_others(message: str, is_one: bool) -> None:
    assert unresponsive_ranks.is_timeout(message) == is_one
