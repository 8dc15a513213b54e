"""``subprocess.Popen`` for ``python PROGRAM ...``, without the interpreter's start: a server forks the process."""

import atexit
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
LARGEST = 100_000  # bytes of a request
SHARED = "WARM_SERVER"  # the variable with the address of a server that another process has started
NAMESPACES = "WARM_NAMESPACES"  # the variable with a process whose user and mount namespaces are joined
START = 120.0  # seconds for the server's imports, on a busy machine
# Variables that are read before a program begins.
IGNORABLE = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)  # by nohup and by shells
READ_AT_START = ("PYTHON", "OMP_", "CUDA_", "TORCH_", "TRITON_", "SYNCBN_")


class WarmProcess(subprocess.Popen):
    """A process of ``[python, [-u,] PROGRAM.py | -m MODULE, ARGUMENTS ...]``. It leads a session of its own."""

    address = ""  # of the server's socket; in the server's own processes it is set

    def _execute_child(self, args: Any, *rest: Any) -> None:
        """In place of Popen's own (CPython 3.11 to 3.13), which forks and executes."""
        _, _, _, _, where, environment, _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_ = rest
        options = list(takewhile(("-u", "-m").__contains__, args[1:]))
        program, *arguments = map(str, args[1 + len(options) :])
        request = {
            "unbuffered": "-u" in options,
            "program": program,
            "arguments": arguments,
            "where": str(where or Path.cwd()),
            "environment": dict(os.environ if environment is None else environment),
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "ignored": [each for each in IGNORABLE if signal.getsignal(each) is signal.SIG_IGN],
        }
        self._answers = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._answers.connect(WarmProcess.address or _server.address())
        streams = [stream if stream >= 0 else number for number, stream in enumerate((p2cread, c2pwrite, errwrite))]
        socket.send_fds(self._answers, [json.dumps(request).encode()], streams)
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self.pid = int(self._answers.recv(32))
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """In place of Popen's own, as the process is a child of the server's."""
        if wait_flags & os.WNOHANG and not select.select([self._answers], [], [], 0)[0]:
            return 0, 0
        status = int(self._answers.recv(32) or signal.SIGKILL)  # nothing comes where the server was killed
        self._answers.close()
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


class _Server:
    """The server of this process, or of all processes of pytest-xdist, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._environment = dict(os.environ)
        self._place = Path()

    def address(self) -> str:
        """Where it listens, once it does."""
        address = Path(os.environ.get(SHARED) or self.start())
        deadline = time.monotonic() + START
        while not address.exists():
            assert self._process is None or self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return str(address)

    def start(self) -> str:
        """Starts it where it has not been started; where it will listen."""
        if self._process is None:
            self._place = Path(tempfile.mkdtemp(prefix="warm-"))
            command = [sys.executable, "-m", "tests.support.warm_server", str(self._place / "socket")]
            options = {"cwd": REPO, "env": self._environment, "start_new_session": True}
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, **options)
        return str(self._place / "socket")

    def can_serve(self, environment: dict[str, str]) -> bool:
        """Whether no variable that differs is read before a program begins, but for PYTHONPATH, which may be longer."""
        ours = self._environment
        names = {name for name in environment.keys() | ours.keys() if environment.get(name) != ours.get(name)}
        return not any(name.startswith(READ_AT_START) for name in names - {"PYTHONPATH"})

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            shutil.rmtree(self._place, ignore_errors=True)
        self._process = None


_server = _Server()
can_serve, start = _server.can_serve, _server.start
atexit.register(_server.close)
