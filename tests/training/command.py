"""Runs ``train.py`` as a user does, in a directory of its own."""

import json
import os
import pty
import signal
import subprocess
import sys
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
    timeout: float = 120,
) -> Run:
    """``python train.py OVERRIDES`` in ``where``; the run directory is the one that was made or changed last.

    With ``terminal`` its standard output is one, and ``err`` is part of ``out``.
    """
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
    """Ours, with the user's project on the path and without what a test runner may have set."""
    dropped = ("HYDRA_FULL_ERROR", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "WANDB_MODE")
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), env.get("PYTHONPATH")]))
    return env | ({"HYDRA_FULL_ERROR": "1"} if full_error else {})


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
