"""The ranks of one machine: started, watched and stopped by a process that is none of them.

torchrun's agent would do, but it stops ranks within 30 seconds and mid-step, knows no rank that hangs, and takes longer
to start one than a small job trains. Ranks are forked from a server that has imported everything once, so in a sweep
only the first job waits for imports.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from syncbn.training import standard_streams
from syncbn.training.console import print_line
from syncbn.training.distributed import loopback, out_of_memory, temporary_directory
from syncbn.training.distributed import signals as stopping
from syncbn.training.distributed.fork_server import can_fork, start_server
from syncbn.training.distributed.rank_error import about
from syncbn.training.distributed.signals import Interrupted, Stopped

STACKS = signal.SIGRTMIN + 4  # asks a rank for its stacks; SIGUSR1 and 2 are Slurm's and submitit's
GRACE = 5.0  # seconds in which the others may end by themselves once one has failed
NO_SERVER = 255  # what multiprocessing takes for a rank's exit code where the fork server is gone (popen_forkserver.py)


@dataclass
class End:
    """How one rank ended.

    Attributes:
        rank: of the machine's ranks.
        pid: its process.
        code: exit code; negative: killed by that signal; None: not known, as the fork server had been killed before.
        error: ``kind``, ``message``, ``place``, ``trace`` and ``guilty`` of the exception that ended it, if one did.
        hung: what it was doing when its time was up and it was killed, where no exception had ended it.
        short_of_memory: whether the kernel has killed a process for lack of memory while the ranks ran.
    """

    rank: int
    pid: int
    code: int | None
    error: dict[str, Any] = field(default_factory=dict)
    hung: str | None = None
    short_of_memory: bool = False


class StartError(RuntimeError):
    """The fork server ended while it started ranks."""

    def __init__(self) -> None:
        super().__init__(
            "the process that ranks are forked from ended while it started them, killed perhaps (see dmesg)"
        )


class Ranks:
    """Processes that run ``entry(*args)`` with the environment variables torchrun would set.

    Args:
        count: how many.
        entry: a function of a module.
        args: for it; they must pickle.
        logs: directory for what ranks other than 0 print.
        silent: what rank 0 prints goes there too.
        signals: a request that comes before the ranks have started raises :class:`Interrupted`. The first start waits
            for the fork server's imports, which take seconds.
    """

    def __init__(
        self,
        count: int,
        entry: Callable[..., None],
        args: tuple[Any, ...],
        logs: Path,
        *,
        silent: bool = False,
        signals: "Requests | None" = None,
    ) -> None:
        self._logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._store = loopback.start_store()
        shared = {
            "MASTER_ADDR": loopback.LOCALHOST,
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store above; no rank has to live for it
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            **loopback.within_machine(),
        }
        self._processes: list[BaseProcess] = []
        self._reports: list[Connection] = []  # no files: a full disk is to be reported too
        self._errors: dict[int, dict[str, Any]] = {}
        self._codes: dict[int, int] = {}  # as ranks themselves report them
        self._gone: set[int] = set()  # ranks whose report has ended, as it does with the process
        self._deadline, self._asked_at = float("inf"), float("-inf")
        self._hung: dict[int, str] = {}
        self._kills = out_of_memory.kills()
        self._lost_server = False
        try:
            with signals.raising() if signals else nullcontext():
                self._start(count, shared, entry, args, silent)
        except BaseException:  # nobody else knows of those that have started
            self.kill()
            raise

    def _start(
        self, count: int, shared: dict[str, str], entry: Callable[..., None], args: tuple[Any, ...], silent: bool
    ) -> None:
        start_server()
        context = multiprocessing.get_context("forkserver" if can_fork() else "spawn")
        for rank in range(count):
            environment = dict(os.environ) | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_be, args=(rank, environment, self._logs, theirs, entry, args, silent), name=f"rank {rank}"
            )
            self._processes.append(process)
            self._reports.append(ours)
            try:
                process.start()
            except (EOFError, ConnectionError) as error:
                raise StartError from error
            theirs.close()

    def watch(self, signals: "Requests", stop_timeout: float, limit: float = float("inf")) -> list[End]:
        """Waits until all have ended, or been ended; how each did, by rank.

        Args:
            signals: what this process has been asked; the first request goes on to the ranks, the second kills them.
            stop_timeout: seconds that the ranks have to stop once they are asked to.
            limit: seconds after which they are killed in any case.
        """
        end = time.monotonic() + limit
        try:
            while self.live(signals, stop_timeout) and time.monotonic() < end:
                wait(self.sentinels(), timeout=0.1)
        finally:
            self.close()
        return self.ends()

    def live(self, signals: "Requests", stop_timeout: float) -> bool:
        """One look, as :meth:`watch` takes again and again: whether there is anybody to wait for still."""
        self._listen()
        living = self._living()
        if not living:
            return False
        if signals.seen and time.monotonic() > self._asked_at + 1:  # again and again: a rank may not listen yet
            self._deadline = min(self._deadline, time.monotonic() + stop_timeout)
            self._asked_at = time.monotonic()
            self._signal(living, signals.seen[0])
        signals.announce()
        ended = [self._code(rank) for rank in range(len(self._processes)) if rank not in living]
        failed = any(code != 0 and not stopped(code) for code in ended)
        if failed or self._errors:  # a rank that has raised something may still hang in its end
            self._deadline = min(self._deadline, time.monotonic() + GRACE)
        if not signals.enough and time.monotonic() > self._deadline:
            self._hung = self._doing(living)
            return False
        return not signals.enough

    def sentinels(self) -> list[Any]:
        """What :func:`multiprocessing.connection.wait` waits for, of those that live."""
        return [
            (self._reports[rank] if self._orphaned(rank) else self._processes[rank].sentinel) for rank in self._living()
        ]

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
        for rank, process in enumerate(self._processes):
            if self._orphaned(rank):
                self._signal([rank], signal.SIGKILL)
            elif process.pid is not None:  # else it has not started
                process.kill()
        for rank, process in enumerate(self._processes):
            if self._orphaned(rank):
                wait([self._reports[rank]], timeout=10)
            elif process.pid is not None:
                process.join()

    def _living(self) -> list[int]:
        return [rank for rank, p in enumerate(self._processes) if p.exitcode is None or self._orphaned(rank)]

    def _orphaned(self, rank: int) -> bool:
        """Whether this rank lives, and multiprocessing has lost it, as the fork server was killed.

        Its report tells both: it ends with the process, and the exit code is the last message.
        """
        if self._processes[rank].exitcode != NO_SERVER:
            return False
        self._listen()
        if rank not in self._gone and not self._lost_server:
            self._lost_server = True
            _say("warning: the process that ranks are forked from was killed; they continue without it")
        return rank not in self._gone

    def _code(self, rank: int) -> int | None:
        """The exit code of a rank that has ended; None if nobody knows it."""
        code = self._processes[rank].exitcode
        return self._codes.get(rank) if code == NO_SERVER else code

    def _signal(self, ranks: list[int], signum: int) -> None:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid or 0, signum)

    def _end(self, rank: int, hung: str | None) -> End:
        process, error = self._processes[rank], self._errors.get(rank, {})
        assert process.pid is not None
        short = out_of_memory.kills() > self._kills
        return End(rank, process.pid, self._code(rank), error, None if error else hung, short)

    def _listen(self) -> None:
        """Takes in what ranks report: the exception that ends one, then its exit code."""
        for rank, report in enumerate(self._reports):
            while rank not in self._gone:
                try:
                    if not report.poll():
                        break
                    said = report.recv()
                except (EOFError, OSError):  # it has ended
                    self._gone.add(rank)
                    break
                if isinstance(said, int):
                    self._codes[rank] = said
                else:
                    self._errors[rank] = said

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
    """Counts signals that ask for a stop while the context lasts; a second SIGINT asks for an end at once.

    A context within another, a job of a sweep, continues its count.

    Args:
        note: called with the first, outside of the handler, by whoever acts on it.
    """

    _outer: "Requests | None" = None

    def __init__(self, note: Callable[[int], None] = lambda signum: None) -> None:
        self.seen: list[int] = []
        self._note = note
        self._noted = self._raises = False
        self._within: Requests | None = None
        self._before: dict[int, Any] = {}

    @property
    def enough(self) -> bool:
        """Whether a second request has come."""
        return any(signum in stopping.AGAIN for signum in self.seen[1:])

    def announce(self) -> None:
        """Calls ``note``, once, if anything was asked."""
        if self.seen and not self._noted:
            self._noted = True
            self._note(self.seen[0])

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within it the first request raises :class:`Interrupted`: there is no step that could be finished."""
        self._raises = True
        try:
            if self.seen:
                raise Interrupted(self.seen[0])
            yield
        finally:
            self._raises = False

    def __enter__(self) -> "Requests":
        if threading.current_thread() is threading.main_thread():
            self._within, Requests._outer = Requests._outer, self
            if self._within is not None:
                self.seen = self._within.seen
            self._before = stopping.handle(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        if Requests._outer is self:
            Requests._outer = self._within
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _count(self, signum: int, frame: FrameType | None) -> None:
        self.seen.append(signum)
        if self._raises and len(self.seen) == 1:
            raise Interrupted(signum)


def stopped(code: int | None) -> bool:
    """Whether a rank ended as asked: 128 + the signal."""
    return code in [128 + signum for signum in stopping.SIGNALS]


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
    os.register_at_fork(after_in_child=report.close)  # so that it ends with this process
    multiprocessing.set_start_method(None, force=True)  # for loaders: the platform's, not ours
    os.environ.clear()  # the server has the one that it was started with
    os.environ.update(environment)
    tempfile.tempdir = None  # likewise
    code = 0
    try:
        threading.Thread(target=_leave_with_launcher, daemon=True).start()
        if rank > 0 or silent:
            _redirect(logs / f"{rank}.log")
        standard_streams.outlive_reader()
        standard_streams.accept_any_text()
        with (logs / f"{rank}.stacks").open("w", encoding="utf-8") as stacks:
            faulthandler.register(STACKS, file=stacks, all_threads=True)
            try:
                entry(*args)
            finally:
                faulthandler.unregister(STACKS)
    except Stopped as stop:
        code = 128 + stop.signum
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else 1
        with suppress(OSError):  # the launcher is gone
            report.send(about(error))
    with suppress(OSError):
        report.send(code)
    sys.exit(code)


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
    temporary_directory.remove()
    os._exit(1)


def _say(message: str) -> None:
    print_line(message, error=True)
