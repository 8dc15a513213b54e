"""Runs ``train.py`` as a user does, in a directory of its own."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.warm_process import NAMESPACES, REPO, WarmProcess, can_serve

PROJECT = Path(__file__).parent / "user_project"


@dataclass
class Run:
    """One finished call of train.py."""

    code: int
    out: str
    err: str
    directory: Path | None
    left: list[int]  # processes that it left behind

    def ended(self, code: int = 0) -> "Run":
        """This call, which has to have ended with this exit code."""
        assert self.code == code, self.err
        return self

    def json(self, name: str) -> dict[str, Any]:
        assert self.directory is not None, self.err
        return json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8"))


def train(
    where: Path,
    *overrides: str,
    launcher: list[str] | None = None,
    full_error: bool = False,
    terminal: bool = False,
    fresh: bool = False,
    timeout: float = 120,
    meanwhile: Callable[[int], None] | None = None,
    gone: Path | None = None,
    within: int | None = None,
) -> Run:
    """``python train.py OVERRIDES`` in ``where``; the run directory is the one that was made or changed last.

    With ``terminal`` its standard output is one, and ``err`` is part of ``out``. Where nothing asks for an interpreter
    of its own (``fresh`` does), it is the fork of one that has imported everything: five seconds less.

    Args:
        where: the directory.
        overrides: the arguments.
        launcher: what the program is an argument of; Python by default.
        full_error: sets HYDRA_FULL_ERROR.
        terminal: whether standard output is one.
        fresh: whether it is an interpreter of its own.
        timeout: seconds.
        meanwhile: called in a thread with the process, which leads a session and a process group.
        gone: output goes into a pipe, whose reader ends once there is this file.
        within: a process whose user and mount namespaces it gets; see ``own_mount.py``.
    """
    command = [*(launcher or [sys.executable]), str(REPO / "train.py"), *overrides]
    env = environment(full_error) | ({} if within is None else {NAMESPACES: str(within)})
    return run(where, *command, terminal=terminal, fresh=fresh, timeout=timeout, meanwhile=meanwhile, gone=gone,
               env=env)  # fmt: skip


def run(
    where: Path,
    *command: str,
    env: dict[str, str],
    timeout: float,
    terminal: bool = False,
    fresh: bool = False,
    meanwhile: Callable[[int], None] | None = None,
    gone: Path | None = None,
) -> Run:
    """Any command; see :func:`train`."""
    popen = WarmProcess if command[0] == sys.executable and not fresh and can_serve(env) else subprocess.Popen
    assert popen is WarmProcess or NAMESPACES not in env
    ours, theirs = pty.openpty() if terminal else os.pipe()
    errors = theirs if terminal or gone is not None else subprocess.PIPE
    # A session of its own: whatever it leaves behind is found by it, and stopped.
    process = popen(
        command, cwd=where, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=errors, start_new_session=True,
        encoding="utf-8",
    )  # fmt: skip
    os.close(theirs)
    reader = _Reader(ours, gone)
    _beside(meanwhile, process.pid)
    try:
        _, err = process.communicate(timeout=timeout)
        left = _left(process.pid)
    except subprocess.TimeoutExpired as late:
        _kill(process.pid)
        _, err = process.communicate()
        raise AssertionError(f"{command} has not ended in {timeout:g} s\n{reader.text()}\n{err}") from late
    finally:  # also where the test's own time is up
        _kill(process.pid)
    return Run(process.returncode, reader.text(), err or "", _newest(where), left)


def contents(directory: Path) -> dict[str, bytes]:
    """The contents of all files in a directory, by their paths below it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def environment(full_error: bool = False) -> dict[str, str]:
    """Ours, with the user's project on the path and without what a test runner, or torch in it, may have set."""
    dropped = ("PYTEST_CURRENT_TEST", "HYDRA_FULL_ERROR", "RANK", "WORLD_SIZE", "WANDB_MODE")
    dropped += ("TORCHINDUCTOR_CACHE_DIR",)
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), env.get("PYTHONPATH")]))
    return env | ({"HYDRA_FULL_ERROR": "1"} if full_error else {})


def _beside(meanwhile: Callable[[int], None] | None, leader: int) -> None:
    if meanwhile is not None:
        threading.Thread(target=meanwhile, args=(leader,), daemon=True).start()


def handles_signals(leader: int) -> bool:
    """Whether train.py has come to its first lines: until then signals are the interpreter's."""
    with suppress(OSError):
        status = Path(f"/proc/{leader}/status").read_text(encoding="utf-8")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return bool(int(fields["SigCgt"], 16) >> (signal.SIGHUP - 1) & 1)
    return False


def _newest(where: Path) -> Path | None:
    runs = sorted(where.glob("outputs/*/run.json"), key=lambda p: p.stat().st_mtime)
    return runs[-1].parent if runs else None


def _left(leader: int) -> list[int]:
    """What still lives of a session once W&B's own process has had time to notice that a killed rank is gone."""
    deadline = time.monotonic() + 15
    while (left := _session(leader)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _kill(leader: int) -> None:
    for pid in _session(leader):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _session(leader: int) -> list[int]:
    """The living processes of the session that this process began."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text(encoding="utf-8").rsplit(")", 1)[1].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


class _Reader(threading.Thread):
    """Reads a terminal or a pipe until the program is gone, so that it does not stop at a full buffer.

    Args:
        descriptor: to read from; it is closed at the end.
        gone: if given, reading ends once there is this file.
    """

    def __init__(self, descriptor: int, gone: Path | None) -> None:
        super().__init__(daemon=True)
        self._descriptor, self._gone, self._pieces = descriptor, gone, []
        self.start()

    def run(self) -> None:
        with suppress(OSError):  # how a terminal ends
            while self._gone is None or not self._gone.exists():
                if select.select([self._descriptor], [], [], 0.02)[0]:
                    piece = os.read(self._descriptor, 65536)
                    if not piece:
                        break
                    self._pieces.append(piece)
        os.close(self._descriptor)

    def text(self) -> str:
        self.join(timeout=10)
        return b"".join(self._pieces).decode()
