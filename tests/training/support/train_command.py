"""Runs ``train.py`` as a user does, in a directory of its own."""

import atexit
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[3]
PROJECT = Path(__file__).parent / "user_project"


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
    """
    if not (launcher or terminal or fresh) and DRIVER.can_have(environment(full_error)):
        more: dict[str, Any] = {"meanwhile": meanwhile, "gone": gone}
        return DRIVER.run(where, *overrides, env=environment(full_error), timeout=timeout, **more)
    assert gone is None
    command = [*(launcher or [sys.executable]), str(REPO / "train.py"), *overrides]
    # A session of its own: whatever it leaves behind is found by it, and stopped.
    options = {"cwd": where, "env": environment(full_error), "start_new_session": True, "encoding": "utf-8"}
    if terminal:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, **options)
        os.close(theirs)
        reader = _Reader(ours)
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    _beside(meanwhile, process.pid)
    try:
        out, err = process.communicate(timeout=timeout)
        left = _left(process.pid)
    finally:
        _kill(process.pid)
    if terminal:
        out, err = reader.text(), ""
    return Run(process.returncode, out, err, _newest(where), left)


def environment(full_error: bool = False) -> dict[str, str]:
    """Ours, with the user's project on the path and without what a test runner, or torch in it, may have set."""
    dropped = ("PYTEST_CURRENT_TEST", "HYDRA_FULL_ERROR", "RANK", "WORLD_SIZE", "WANDB_MODE")
    dropped += ("TORCHINDUCTOR_CACHE_DIR",)
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), env.get("PYTHONPATH")]))
    return env | ({"HYDRA_FULL_ERROR": "1"} if full_error else {})


class Driver:
    """Calls of train.py, or of another program, that are forked from one process (``forking_driver.py``)."""

    def __init__(self) -> None:
        self._environment = environment()
        self._process: subprocess.Popen | None = None
        self._place = Path(tempfile.mkdtemp(prefix="driver-"))

    def can_have(self, env: dict[str, str]) -> bool:
        """Whether what differs in the environment is not looked at before train.py begins."""
        names = {name for name in env.keys() | self._environment.keys() if env.get(name) != self._environment.get(name)}
        return not any(name.startswith(("PYTHON", "OMP_", "CUDA_", "TORCH_", "SYNCBN_")) for name in names)

    def run(
        self,
        where: Path,
        *arguments: str,
        env: dict[str, str],
        timeout: float,
        program: Path = REPO / "train.py",
        meanwhile: Callable[[int], None] | None = None,
        gone: Path | None = None,
    ) -> Run:
        if self._process is None:
            self._start()
        assert self._process is not None
        files = [self._place / name for name in ("out", "err")]
        for path in files:
            path.unlink(missing_ok=True)
        if gone is not None:
            os.mkfifo(files[0])
            files[1] = files[0]
            threading.Thread(target=_read_until, args=(files[0], gone), daemon=True).start()
        call = {"program": str(program), "arguments": arguments, "where": str(where), "environment": env}
        print(json.dumps(call | {"files": list(map(str, files))}), file=self._process.stdin, flush=True)
        pid = int(self._answers.readline())
        _beside(meanwhile, pid)
        try:
            answered, _, _ = select.select([self._answers], [], [], timeout)
            left = _left(pid) if answered else []
        finally:  # also where the test's own time is up: an answer that nobody took would be the next call's
            _kill(pid)
            code = int(self._answers.readline())
        out, err = ("", "") if gone is not None else (path.read_text(encoding="utf-8") for path in files)
        if not answered:
            raise AssertionError(f"{program.name} {arguments} has not ended in {timeout:g} s\n{out}\n{err}")
        return Run(code, out, err, _newest(where), left)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()  # type: ignore[union-attr]
            self._answers.close()
        self._process = None
        shutil.rmtree(self._place, ignore_errors=True)

    def _start(self) -> None:
        ours, answers = os.pipe()
        self._answers = os.fdopen(ours, "rb", buffering=0)
        command = [sys.executable, "-m", "tests.training.support.forking_driver", str(answers)]
        options = {"cwd": REPO, "env": self._environment, "start_new_session": True, "encoding": "utf-8"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[answers], **options)
        os.close(answers)


def _beside(meanwhile: Callable[[int], None] | None, leader: int) -> None:
    if meanwhile is not None:
        threading.Thread(target=meanwhile, args=(leader,), daemon=True).start()


def _read_until(pipe: Path, gone: Path) -> None:
    """The reader of a pipe, which ends once there is this file."""
    reader = os.open(pipe, os.O_RDONLY)
    os.set_blocking(reader, False)
    while not gone.exists():
        with suppress(BlockingIOError):
            os.read(reader, 65536)
        time.sleep(0.02)
    os.close(reader)


def handles_signals(leader: int) -> bool:
    """Whether train.py has come to its first lines: until then signals are the interpreter's."""
    with suppress(OSError):
        status = Path(f"/proc/{leader}/status").read_text(encoding="utf-8")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return bool(int(fields["SigCgt"], 16) >> (signal.SIGHUP - 1) & 1)
    return False


DRIVER = Driver()
atexit.register(DRIVER.close)


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
