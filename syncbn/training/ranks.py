"""The ranks of one machine: started, watched and stopped by a process that is none of them.

torchrun's agent would do, but it stops ranks within 30 seconds and mid-step, knows no rank that hangs, and takes longer
to start one than a small job trains. Ranks are forked from a server that has imported everything once, so in a sweep
only the first job waits for imports.
"""

import atexit
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from syncbn.training import escaping, stopping
from syncbn.training.stopping import Stopped

STACKS = signal.SIGRTMIN + 4  # asks a rank for its stacks; SIGUSR1 and 2 are Slurm's and submitit's
GRACE = 5.0  # seconds in which the others may end by themselves once one has failed


@dataclass
class End:
    """How one rank ended.

    Attributes:
        rank: of the machine's ranks.
        pid: its process.
        code: exit code; negative: killed by that signal.
        error: ``kind``, ``message``, ``place``, ``trace`` and ``guilty`` of the exception that ended it, if one did.
        hung: what it was doing when its time was up and it was killed, where no exception had ended it.
    """

    rank: int
    pid: int
    code: int
    error: dict[str, Any] = field(default_factory=dict)
    hung: str | None = None


class Ranks:
    """Processes that run ``entry(*args)`` with the environment variables torchrun would set.

    Args:
        count: how many.
        entry: a function of a module.
        args: for it; they must pickle.
        logs: directory for what ranks other than 0 print.
        silent: what rank 0 prints goes there too.
    """

    def __init__(
        self, count: int, entry: Callable[..., None], args: tuple[Any, ...], logs: Path, *, silent: bool = False
    ) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not by name

        self._logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store above; no rank has to live for it
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
        }
        self._processes: list[BaseProcess] = []
        self._reports: list[Connection] = []  # no files: a full disk is to be reported too
        self._errors: dict[int, dict[str, Any]] = {}
        self._deadline, self._asked_at = float("inf"), float("-inf")
        self._hung: dict[int, str] = {}
        try:
            self._start(count, shared, entry, args, silent)
        except BaseException:  # nobody else knows of those that have started
            self.kill()
            raise

    def _start(
        self, count: int, shared: dict[str, str], entry: Callable[..., None], args: tuple[Any, ...], silent: bool
    ) -> None:
        context = multiprocessing.get_context("forkserver" if _can_fork() else "spawn")
        for rank in range(count):
            environment = dict(os.environ) | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_be, args=(rank, environment, self._logs, theirs, entry, args, silent), name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._reports.append(ours)

    def watch(self, signals: "Requests", stop_timeout: float) -> list[End]:
        """Waits until all have ended, or been ended; how each did, by rank.

        Args:
            signals: what this process has been asked; the first request goes on to the ranks, the second kills them.
            stop_timeout: seconds that the ranks have to stop once they are asked to.
        """
        try:
            while self.live(signals, stop_timeout):
                wait(self.sentinels(), timeout=0.1)
        finally:
            self.close()
        return self.ends()

    def live(self, signals: "Requests", stop_timeout: float) -> bool:
        """One look, as :meth:`watch` takes again and again: whether there is anybody to wait for still."""
        living = [rank for rank, p in enumerate(self._processes) if p.exitcode is None]
        if not living:
            return False
        if signals.seen and time.monotonic() > self._asked_at + 1:  # again and again: a rank may not listen yet
            self._deadline = min(self._deadline, time.monotonic() + stop_timeout)
            self._asked_at = time.monotonic()
            self._signal(living, signals.seen[0])
        failed = any(p.exitcode not in (None, 0) and not stopped(p.exitcode) for p in self._processes)
        self._listen()
        if failed or self._errors:  # a rank that has raised something may still hang in its end
            self._deadline = min(self._deadline, time.monotonic() + GRACE)
        if not signals.enough and time.monotonic() > self._deadline:
            self._hung = self._doing(living)
            return False
        return not signals.enough

    def sentinels(self) -> list[int]:
        """What :func:`multiprocessing.connection.wait` waits for, of those that live."""
        return [p.sentinel for p in self._processes if p.exitcode is None]

    def close(self) -> None:
        """Ends all that still live, and takes in what they had to say."""
        self.kill()
        self._listen()
        for report in self._reports:
            report.close()

    def ends(self) -> list[End]:
        """How each has ended, by rank."""
        return [self._end(rank, self._hung.get(rank)) for rank in range(len(self._processes))]

    def kill(self) -> None:
        """Ends all that still live, at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _signal(self, ranks: list[int], signum: int) -> None:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid or 0, signum)

    def _end(self, rank: int, hung: str | None) -> End:
        process, error = self._processes[rank], self._errors.get(rank, {})
        assert process.pid is not None
        assert process.exitcode is not None
        return End(rank, process.pid, process.exitcode, error, None if error else hung)

    def _listen(self) -> None:
        """Takes in what ranks have to say, which are errors."""
        for rank, report in enumerate(self._reports):
            with suppress(EOFError, OSError):  # it has ended
                if report.poll():
                    self._errors[rank] = report.recv()

    def _doing(self, ranks: list[int]) -> dict[int, str]:
        """In words, what ranks that do not end are doing; their stacks go into the logs."""
        doing = {rank: "is stopped, by SIGSTOP or a debugger" for rank in ranks if self._is_stopped(rank)}
        asked = [rank for rank in ranks if rank not in doing and (self._logs / f"{rank}.stacks").exists()]
        self._signal(asked, STACKS)
        time.sleep(0.5)
        for rank in asked:
            stacks = self._logs / f"{rank}.stacks"
            answered = stacks.stat().st_size > 0
            doing[rank] = f"is busy or waiting (its stacks: {stacks})" if answered else "does not answer"
        return doing

    def _is_stopped(self, rank: int) -> bool:
        state = Path(f"/proc/{self._processes[rank].pid}/stat")
        return (
            state.exists() and state.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] in "Tt"
        )


class Requests:
    """Counts SIGINT and SIGTERM while the context lasts: one asks for a stop, a second SIGINT for an end at once."""

    def __init__(self, note: Callable[[int], None]) -> None:
        self.seen: list[int] = []
        self._note = note
        self._before: dict[int, Any] = {}

    @property
    def enough(self) -> bool:
        """Whether a second request has come."""
        return signal.SIGINT in self.seen[1:]

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._count) for signum in stopping.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _count(self, signum: int, frame: FrameType | None) -> None:
        self.seen.append(signum)
        if len(self.seen) == 1:
            self._note(signum)


def stopped(code: int | None) -> bool:
    """Whether a rank ended as asked: 128 + the signal."""
    return code in [128 + signum for signum in stopping.SIGNALS]


def start_server(preload: str) -> None:
    """Starts the process that ranks are forked from, once in the life of this one, and does not wait for it.

    Args:
        preload: a module that it imports.
    """
    if not _can_fork():
        return
    # A process that has asked CUDA anything must not fork. Asked through NVML, "is there a GPU" asks CUDA nothing.
    environment = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)  # and it is to import what this process would
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload([preload])
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    atexit.register(_end_server)


def _end_server() -> None:
    """It would end by itself, but only when its imports are done."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _can_fork() -> bool:
    return "forkserver" in multiprocessing.get_all_start_methods()  # not so on Windows


def _be(
    rank: int,
    environment: dict[str, str],
    logs: Path,
    report: Connection,
    entry: Callable[..., None],
    args: tuple[Any, ...],
    silent: bool,
) -> None:
    """A rank's life."""
    stopping.listen()
    escaping.accept_any_text()
    multiprocessing.set_start_method(None, force=True)  # for loaders: the platform's, not ours
    os.environ.clear()  # the server has the one that it was started with
    os.environ.update(environment)
    threading.Thread(target=_leave_with_launcher, daemon=True).start()
    if rank > 0 or silent:
        _redirect(logs / f"{rank}.log")
    with (logs / f"{rank}.stacks").open("w", encoding="utf-8") as stacks:
        faulthandler.register(STACKS, file=stacks, all_threads=True)
        code = 0
        try:
            entry(*args)
        except Stopped as stop:
            code = 128 + stop.signum
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else 1
            report.send(about(error))
        faulthandler.unregister(STACKS)
    sys.exit(code)


def about(error: BaseException) -> dict[str, Any]:
    """What the launcher is told of an exception; short enough for a pipe (64 KiB) that nobody reads yet."""
    return {
        "kind": type(error).__name__,
        "message": str(error)[:3000],
        "trace": "".join(traceback.format_exception(error))[-12000:],
        "place": _place(error),
        "guilty": bool(getattr(error, "guilty", False)),
    }


def _place(error: BaseException) -> str:
    """Where it was raised: the innermost line that is not of an installed package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and frame.filename != __file__]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""


def _redirect(path: Path) -> None:
    """What this process writes goes into a file, its children's output too."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _leave_with_launcher() -> None:
    """Ends this process when the one that watches it is gone, also where a message hangs."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os._exit(1)
