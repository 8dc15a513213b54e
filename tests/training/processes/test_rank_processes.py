"""What the launching process makes of ranks that end in odd ways."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.util import Finalize
from pathlib import Path

import pytest

from syncbn.training.distributed import signals
from syncbn.training.distributed.python_internals import fork_server_pid
from syncbn.training.distributed.signals import Interrupted, Stopped
from syncbn.training.launch import outcome
from syncbn.training.processes import fork_server
from syncbn.training.processes import rank_processes as ranks_module
from syncbn.training.processes.rank_processes import End, Ranks, Requests, StartError

AT_THE_END = {"hangs": lambda: time.sleep(60), "is aborted": os.abort}


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """One that has imported this module, so that ranks need not; what an earlier test file left has other imports."""
    if (before := fork_server_pid()) is not None:
        with suppress(ProcessLookupError, ChildProcessError):  # it has ended already
            os.kill(before, signal.SIGKILL)
            os.waitid(os.P_PID, before, os.WEXITED | os.WNOWAIT)
    fork_server.start_server(__name__, "no.such.module", "wave")


def raise_and_not_end_well(how: str, message: str) -> None:
    """Rank 0 does; rank 1 waits for it for ever."""
    if os.environ["RANK"] == "1":
        time.sleep(60)
    Finalize(None, AT_THE_END[how], exitpriority=1)
    raise ValueError(message)


def sleep(seconds: float) -> None:
    """Rank 0 has ended well long before rank 1."""
    if os.environ["RANK"] == "1":
        time.sleep(seconds)


def end_without_a_server(server: int, place: Path) -> None:
    """Rank 0 ends with a code, rank 1 is killed, rank 2 is asked to stop; all once the fork server is dead."""
    rank = os.environ["RANK"]
    (place / rank).touch()
    if rank == "0":
        while not all((place / each).exists() for each in "012"):
            time.sleep(0.02)
        time.sleep(0.5)  # the launcher has read that the last has started
        os.kill(server, signal.SIGKILL)
    while os.getppid() == server:
        time.sleep(0.05)
    time.sleep(0.3)
    if rank == "0":
        sys.exit(3)
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.asked()
    raise Stopped(signal.SIGTERM)


def ignore_group(place: Path) -> None:
    """A rank with a loader worker, and all of the group get a signal; the worker ends only when its rank ends it."""
    worker = multiprocessing.get_context("fork").Process(target=work, args=(place,))
    worker.start()
    while not (place / "works").exists():
        time.sleep(0.02)
    assert worker.pid is not None
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        subprocess.run(["kill", f"-{number}", str(worker.pid), str(os.getppid())], check=True)
    time.sleep(0.3)
    alive = worker.is_alive()
    worker.terminate()
    worker.join(20)
    (place / "said").write_text(f"{alive} {worker.exitcode}", encoding="utf-8")


def work(place: Path) -> None:
    """What a loader worker does: torch's handlers, and a decoder that it starts and ends."""
    from torch.utils.data._utils import signal_handling

    signal_handling._set_worker_signal_handlers()
    decoder = subprocess.Popen(["sleep", "100"])
    decoder.terminate()
    assert decoder.wait(20) == -signal.SIGTERM
    (place / "works").touch()
    time.sleep(60)


def watch(tmp_path: Path, entry: Callable[..., None], *args: object) -> list[End]:
    return Ranks(2, entry, args, tmp_path / "ranks").watch(Requests(lambda signum: None), stop_timeout=1)


@pytest.mark.parametrize(("how", "message"), [("hangs", "a server's timeout"), ("is aborted", "the cause")])
def test_a_rank_that_raises_is_to_blame_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, message: str
) -> None:
    monkeypatch.setattr(ranks_module, "GRACE", 1.0)
    begin = time.monotonic()
    first, second = watch(tmp_path, raise_and_not_end_well, how, message)
    assert time.monotonic() - begin < 30
    assert first.error["kind"] == "ValueError"
    assert first.code < 0
    assert first.hung is None
    assert (second.error, second.code) == ({}, -9)
    line = outcome.of([first, second], [], tmp_path, "go on").message
    assert line.startswith(f"rank 0 of 2 (pid {first.pid}) failed: ValueError: {message} (")


def test_ranks_may_end_at_different_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "GRACE", 0.2)
    assert [end.code for end in watch(tmp_path, sleep, 3.0)] == [0, 0]


def test_ranks_have_what_their_server_imported(tmp_path: Path) -> None:
    ranks = Ranks(1, note_import, ("wave", tmp_path / "found"), tmp_path / "ranks")
    assert [end.code for end in ranks.watch(Requests(), stop_timeout=10)] == [0]
    assert (tmp_path / "found").read_text(encoding="utf-8") == "True"


def note_import(name: str, path: Path) -> None:
    path.write_text(str(name in sys.modules), encoding="utf-8")


def test_without_their_server_ranks_end_as_they_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fork_server.start_server()
    server = fork_server_pid()
    assert server is not None
    ranks = Ranks(3, end_without_a_server, (server, tmp_path), tmp_path / "ranks")
    ends = ranks.watch(Requests(), stop_timeout=10)
    assert [end.code for end in ends] == [3, None, 143]
    assert capsys.readouterr().err.count("warning: the fork server was killed") == 1
    line = outcome.of(ends[1:2], [], tmp_path, "go on").message
    assert "of 1 (pid " in line
    assert line.endswith(" with an unknown exit code: the fork server was killed before it ended; go on")
    assert [end.code for end in watch(tmp_path, sleep, 0.1)] == [0, 0]  # by another server


def test_a_server_that_ends_while_it_starts_ranks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> None:
        """After multiprocessing has looked whether its server lives, or it would start another."""
        monkeypatch.setattr(forkserver._forkserver, "ensure_running", lambda: None)
        os.kill(fork_server_pid() or 0, signal.SIGKILL)

    fork_server.start_server()
    monkeypatch.setattr(ranks_module, "start_server", killed)
    with pytest.raises(StartError, match=r"ended while it started the ranks, killed perhaps \(see dmesg\)"):
        Ranks(2, sleep, (60.0,), tmp_path / "ranks")


def test_a_signal_to_the_group_leaves_helpers_alone(tmp_path: Path) -> None:
    (end,) = Ranks(1, ignore_group, (tmp_path,), tmp_path / "ranks").watch(Requests(), stop_timeout=10)
    assert (end.code, end.error) == (0, {})
    assert (tmp_path / "said").read_text(encoding="utf-8") == "True 0"


def test_a_request_ends_the_wait_for_the_first_rank(tmp_path: Path) -> None:
    requests = Requests()
    with requests, Requests() as inner:
        signal.raise_signal(signal.SIGHUP)
        assert (requests.seen, inner.seen, inner.kill_requested) == ([signal.SIGHUP], [signal.SIGHUP], False)
        with pytest.raises(Interrupted, match="stopped by SIGHUP"):
            Ranks(2, sleep, (60.0,), tmp_path / "ranks", signals=inner)
        signal.raise_signal(signal.SIGTERM)
        assert not inner.kill_requested
        signal.raise_signal(signal.SIGINT)
        assert inner.kill_requested


@pytest.mark.parametrize(("environment", "heard"), [({}, 130), ({"TORCHELASTIC_RUN_ID": "a"}, 2)])
def test_what_is_left_running_by_nohup_stays(environment: dict[str, str], heard: int) -> None:
    """In the launcher, and in a rank, which notes a signal: the first of SIGNALS, SIGINT."""
    code = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code += "from syncbn.training.distributed import signals\n"
    code += "signals.begin(); signal.raise_signal(signal.SIGHUP); signals.asked() and sys.exit(9)\n"
    code += "signal.raise_signal(signal.SIGINT); sys.exit(1 + signals.asked())"
    options = {"env": dict(os.environ) | environment, "check": False, "timeout": 60}
    assert subprocess.run([sys.executable, "-c", code], **options).returncode == heard


def test_multiprocessing_still_has_what_is_reached_for() -> None:
    """Private attributes of CPython 3.11."""
    assert hasattr(forkserver._forkserver, "_forkserver_pid")
    assert callable(subprocess.Popen._execute_child)
