"""Starts, monitors and stops the rank processes of one machine. The launcher that does this is not a rank itself.

torchrun's agent could do this too. But it stops ranks within 30 seconds and in the middle of a step, does not detect a
rank that hangs, and takes longer to start a rank than a small job trains. Ranks are forked from a server that has
imported everything once, so in a sweep only the first job waits for imports.
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
from syncbn.training.distributed import loopback
from syncbn.training.distributed import signals as stopping
from syncbn.training.distributed.signals import Interrupted, Stopped
from syncbn.training.processes import out_of_memory, temporary_directory
from syncbn.training.processes.fork_server import start_server
from syncbn.training.processes.rank_error import describe

STACKS = signal.SIGRTMIN + 4  # makes a rank write its stacks; SIGUSR1 and SIGUSR2 are used by Slurm and submitit
GRACE = 5.0  # seconds that the other ranks have to end after one has failed
NO_SERVER = 255  # multiprocessing's exit code for any process whose fork server is gone (popen_forkserver.py)


@dataclass
class End:
    """How one rank ended.

    Attributes:
        rank: the local rank.
        pid: its process id.
        code: exit code; negative for the signal that killed it; None if unknown because the fork server was killed.
        error: ``kind``, ``message``, ``place``, ``trace`` and ``guilty`` of the exception that ended it; else empty.
        hung: what the rank was doing when it was killed after its time-out; None if it ended itself.
        short_of_memory: the kernel has killed a process because memory ran out while the ranks ran.
    """

    rank: int
    pid: int
    code: int | None
    error: dict[str, Any] = field(default_factory=dict)
    hung: str | None = None
    short_of_memory: bool = False


class StartError(RuntimeError):
    """The fork server ended while it started ranks."""


class Ranks:
    """Processes that run ``entry(*args)`` with the environment variables torchrun would set.

    Args:
        count: the number of ranks.
        entry: a function at the top level of a module.
        args: of the function; they must pickle.
        logs: directory of the log files, which take the output of all ranks but 0.
        silent: the output of rank 0 goes to a log file too.
        signals: a signal before all ranks have started raises :class:`Interrupted`. The first start waits for the fork
            server's imports, which take seconds.
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
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the ranks use the store above, which outlives any of them
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": "0",
            **loopback.within_machine(),
        }
        self._processes: list[BaseProcess] = []
        self._reports: list[Connection] = []  # pipes and not files: a rank has to report a full disk too
        self._errors: dict[int, dict[str, Any]] = {}
        self._codes: dict[int, int] = {}  # exit codes that the ranks report themselves
        self._gone: set[int] = set()  # ranks whose pipe is closed, which the kernel does when the process ends
        self._deadline, self._asked_at = float("inf"), float("-inf")
        self._hung: dict[int, str] = {}
        self._kills = out_of_memory.kills()
        self._lost_server = False
        try:
            with signals.raising() if signals else nullcontext():
                self._start(count, shared, entry, args, silent)
        except BaseException:  # the caller gets no object, so it could not end the ranks that have started
            self.kill()
            raise

    def _start(
        self, count: int, shared: dict[str, str], entry: Callable[..., None], args: tuple[Any, ...], silent: bool
    ) -> None:
        start_server()
        context = multiprocessing.get_context("forkserver")
        for rank in range(count):
            environment = dict(os.environ) | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(rank, environment, self._logs, theirs, entry, args, silent), name=f"rank {rank}"
            )
            self._processes.append(process)
            self._reports.append(ours)
            try:
                process.start()
            except (EOFError, ConnectionError) as error:
                ended = "the fork server ended while it started the ranks, killed perhaps (see dmesg)"
                raise StartError(ended) from error
            theirs.close()

    def watch(self, signals: "Requests", stop_timeout: float, limit: float = float("inf")) -> list[End]:
        """Waits until all ranks have ended or been killed.

        Args:
            signals: that this process receives. The first is forwarded to the ranks, a second one kills them.
            stop_timeout: seconds that the ranks have to stop after the first signal.
            limit: seconds after which the ranks are killed in any case.

        Returns:
            How each rank ended, by rank.
        """
        end = time.monotonic() + limit
        try:
            while self.poll(signals, stop_timeout) and time.monotonic() < end:
                wait(self.sentinels(), timeout=0.1)
        finally:
            self.close()
        return self.ends()

    def poll(self, signals: "Requests", stop_timeout: float) -> bool:
        """Checks the ranks once and forwards signals; whether to keep waiting. :meth:`watch` calls it repeatedly."""
        self._read_reports()
        living = self._living()
        if not living:
            return False
        if signals.seen and time.monotonic() > self._asked_at + 1:  # each second: a rank may have no handler yet
            self._deadline = min(self._deadline, time.monotonic() + stop_timeout)
            self._asked_at = time.monotonic()
            self._signal(living, signals.seen[0])
        signals.announce()
        ended = [self._code(rank) for rank in range(len(self._processes)) if rank not in living]
        failed = any(code != 0 and not stopped(code) for code in ended)
        if failed or self._errors:  # a rank that has reported an exception may still hang while it exits
            self._deadline = min(self._deadline, time.monotonic() + GRACE)
        if not signals.kill_requested and time.monotonic() > self._deadline:
            self._hung = self._activities(living)
            return False
        return not signals.kill_requested

    def sentinels(self) -> list[Any]:
        """Objects for :func:`multiprocessing.connection.wait`, one for each rank that lives."""
        return [
            (self._reports[rank] if self._orphaned(rank) else self._processes[rank].sentinel) for rank in self._living()
        ]

    def close(self) -> None:
        """Kills the ranks that still live, and reads the reports of all."""
        self.kill()
        self._read_reports()
        for report in self._reports:
            report.close()

    def ends(self) -> list[End]:
        """How each rank has ended, by rank."""
        short_of_memory, ends = out_of_memory.kills() > self._kills, []
        for rank, process in enumerate(self._processes):
            assert process.pid is not None
            error = self._errors.get(rank, {})
            hung = None if error else self._hung.get(rank)
            ends.append(End(rank, process.pid, self._code(rank), error, hung, short_of_memory))
        return ends

    def kill(self) -> None:
        """Kills the ranks that still live, and waits for their ends."""
        for rank, process in enumerate(self._processes):
            if self._orphaned(rank):
                self._signal([rank], signal.SIGKILL)
            elif process.pid is not None:  # None: it has not started
                process.kill()
        for rank, process in enumerate(self._processes):
            if self._orphaned(rank):
                wait([self._reports[rank]], timeout=10)
            elif process.pid is not None:
                process.join()

    def _living(self) -> list[int]:
        return [rank for rank, p in enumerate(self._processes) if p.exitcode is None or self._orphaned(rank)]

    def _orphaned(self, rank: int) -> bool:
        """Whether this rank lives, but multiprocessing reports it as ended because the fork server was killed.

        The pipe of the rank shows it: the pipe closes when the process ends, and the exit code is its last message.
        """
        if self._processes[rank].exitcode != NO_SERVER:
            return False
        self._read_reports()
        if rank not in self._gone and not self._lost_server:
            self._lost_server = True
            print_line("warning: the fork server was killed; the ranks continue without it", error=True)
        return rank not in self._gone

    def _code(self, rank: int) -> int | None:
        """The exit code of a rank that has ended; None if it is unknown."""
        code = self._processes[rank].exitcode
        return self._codes.get(rank) if code == NO_SERVER else code

    def _signal(self, ranks: list[int], signum: int) -> None:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid or 0, signum)

    def _read_reports(self) -> None:
        """Reads the pipes of the ranks: each sends the exception that ends it, if there is one, and its exit code."""
        for rank, report in enumerate(self._reports):
            while rank not in self._gone:
                try:
                    if not report.poll():
                        break
                    received = report.recv()
                except (EOFError, OSError):  # the rank has ended
                    self._gone.add(rank)
                    break
                if isinstance(received, int):
                    self._codes[rank] = received
                else:
                    self._errors[rank] = received

    def _activities(self, ranks: list[int]) -> dict[int, str]:
        """Describes what ranks that do not end are doing; makes them write their stacks into the log directory."""
        found = {rank: "is stopped, by SIGSTOP or a debugger" for rank in ranks if self._is_stopped(rank)}
        asked = [rank for rank in ranks if rank not in found and (self._logs / f"{rank}.stacks").exists()]
        self._signal(asked, STACKS)
        time.sleep(0.5)
        for rank in asked:
            stacks = self._logs / f"{rank}.stacks"
            answered = stacks.stat().st_size > 0
            found[rank] = f"is busy or waiting (its stacks: {stacks})" if answered else "does not answer"
        return found

    def _is_stopped(self, rank: int) -> bool:
        stat = Path(f"/proc/{self._processes[rank].pid}/stat")
        return (
            stat.exists() and stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] in "Tt"
        )


class Requests:
    """Counts the signals that ask for a stop within its context; a second SIGINT or SIGQUIT ends the run at once.

    A nested context, such as that of a job in a sweep, continues the count of the outer one.

    Args:
        note: called with the first signal, outside of the signal handler, by :meth:`announce`.
    """

    _outer: "Requests | None" = None

    def __init__(self, note: Callable[[int], None] = lambda signum: None) -> None:
        self.seen: list[int] = []
        self._note = note
        self._noted = self._raises = False
        self._within: Requests | None = None
        self._before: dict[int, Any] = {}

    @property
    def kill_requested(self) -> bool:
        """Whether a second signal has come, and it is SIGINT or SIGQUIT."""
        return any(signum in stopping.AGAIN for signum in self.seen[1:])

    def announce(self) -> None:
        """Calls ``note`` once, if a signal has come."""
        if self.seen and not self._noted:
            self._noted = True
            self._note(self.seen[0])

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within this context the first signal raises :class:`Interrupted`; for work without training steps."""
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
    """Whether this exit code is that of a rank that stopped after a signal: 128 + the signal."""
    return code in [128 + signum for signum in stopping.SIGNALS]


def _run_rank(
    rank: int,
    environment: dict[str, str],
    logs: Path,
    report: Connection,
    entry: Callable[..., None],
    args: tuple[Any, ...],
    silent: bool,
) -> None:
    """Main function of a rank process: runs ``entry``, and sends its exception and exit code to the launcher."""
    stopping.listen()
    os.register_at_fork(after_in_child=report.close)  # a data loader worker must not keep the pipe open
    multiprocessing.set_start_method(None, force=True)  # data loaders use the platform's default, not the fork server
    os.environ.clear()  # a forked process has the environment of the server
    os.environ.update(environment)
    tempfile.tempdir = None  # its cached value is from the environment of the server too
    code = 0
    try:
        threading.Thread(target=_exit_with_launcher, daemon=True).start()
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
            report.send(describe(error))
    with suppress(OSError):
        report.send(code)
    sys.exit(code)


def _redirect(path: Path) -> None:
    """Redirects the output of this process and its children into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _exit_with_launcher() -> None:
    """Ends this process when the launcher is gone, even if a collective hangs."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    temporary_directory.remove()
    os._exit(1)
