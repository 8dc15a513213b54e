"""Runs ``train.py`` as a user does, in a directory of its own."""

import atexit
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
PROJECT = Path(__file__).parent / "project"


@dataclass
class Run:
    """One finished call of train.py."""

    code: int
    out: str
    err: str
    directory: Path | None
    left: list[int]  # processes that it left behind

    def json(self, name: str) -> dict[str, Any]:
        assert self.directory is not None, self.err
        return json.loads((self.directory / f"{name}.json").read_text())


def train(
    where: Path,
    *overrides: str,
    launcher: list[str] | None = None,
    full_error: bool = False,
    terminal: bool = False,
    fresh: bool = False,
    timeout: float = 120,
) -> Run:
    """``python train.py OVERRIDES`` in ``where``; the run directory is the one that was made or changed last.

    With ``terminal`` its standard output is one, and ``err`` is part of ``out``. Where nothing asks for a process of
    its own (``fresh`` does), it is one that is kept: five seconds less. Then ``left`` says nothing.
    """
    if not (launcher or full_error or terminal or fresh) and environment() == DRIVER.environment:
        return DRIVER.train(where, *overrides, timeout=timeout)
    command = [*(launcher or [sys.executable]), str(REPO / "train.py"), *overrides]
    # A session of its own: whatever it leaves behind is found by it, and stopped.
    options = {"cwd": where, "env": environment(full_error), "start_new_session": True, "text": True}
    if terminal:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, **options)
        os.close(theirs)
        reader = _Reader(ours)
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(timeout=timeout)
        deadline = time.monotonic() + 15  # W&B's own process notices within seconds that a killed rank is gone
        while (left := _session(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        for pid in _session(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if terminal:
        out, err = reader.text(), ""
    runs = sorted(where.glob("outputs/*/run.json"), key=lambda p: p.stat().st_mtime)
    return Run(process.returncode, out, err, runs[-1].parent if runs else None, left)


def environment(full_error: bool = False) -> dict[str, str]:
    """Ours, with the user's project on the path and without what a test runner, or torch in it, may have set."""
    dropped = ("PYTEST_CURRENT_TEST", "HYDRA_FULL_ERROR", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "WANDB_MODE")
    dropped += ("TORCHINDUCTOR_CACHE_DIR",)
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), env.get("PYTHONPATH")]))
    return env | ({"HYDRA_FULL_ERROR": "1"} if full_error else {})


class Driver:
    """Calls of train.py in one process that is kept (``driver.py``), in an environment that stays the same."""

    def __init__(self) -> None:
        self.environment = environment()
        self._process: subprocess.Popen | None = None
        self._place = Path(tempfile.mkdtemp(prefix="driver-"))

    def train(self, where: Path, *overrides: str, timeout: float = 120) -> Run:
        if self._process is None:
            self._start()
        assert self._process is not None
        for path in self._files:
            os.truncate(path, 0)  # they are open for appending
        print(json.dumps({"arguments": overrides, "where": str(where)}), file=self._process.stdin, flush=True)
        answered, _, _ = select.select([self._answers], [], [], timeout)
        code = self._answers.readline() if answered else ""
        out, err = (path.read_text() for path in self._files)
        if not code:
            self.close()
            raise AssertionError(f"train.py {overrides} gave no answer in {timeout:g} s\n{out}\n{err}")
        runs = sorted(where.glob("outputs/*/run.json"), key=lambda p: p.stat().st_mtime)
        return Run(int(code), out, err, runs[-1].parent if runs else None, [])

    def close(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdin.close()  # type: ignore[union-attr]
            self._answers.close()
        self._process = None

    def _start(self) -> None:
        self._files = [self._place / "out", self._place / "err"]
        theirs = [os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND) for path in self._files]
        ours, answers = os.pipe()
        self._answers = os.fdopen(ours)
        command = [sys.executable, "-m", "tests.training.driver", str(answers)]
        options = {"cwd": REPO, "env": self.environment, "start_new_session": True, "text": True, "pass_fds": [answers]}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs[0], stderr=theirs[1], **options)
        for descriptor in (*theirs, answers):
            os.close(descriptor)


DRIVER = Driver()
atexit.register(DRIVER.close)


def _session(leader: int) -> list[int]:
    """The living processes of the session that this process began."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text().rsplit(")", 1)[1].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


class _Reader(threading.Thread):
    """Reads a terminal until the program is gone, so that it does not stop at a full buffer."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(daemon=True)
        self.descriptor, self.pieces = descriptor, []
        self.start()

    def run(self) -> None:
        with suppress(OSError):  # how a terminal ends
            while piece := os.read(self.descriptor, 65536):
                self.pieces.append(piece)

    def text(self) -> str:
        self.join(timeout=10)
        os.close(self.descriptor)
        return b"".join(self.pieces).decode()
