"""Handles the signals that ask a run to stop, in each of its processes.

In a rank the signal handler only sets a flag, on which all ranks agree at the next step. Lightning saves a checkpoint
within the signal handler instead. The signal reaches each rank at a different point of its step, so one rank waits for
a collective that another never calls (Lightning issue 21406).
"""

import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from syncbn.training.distributed.python_internals import start_programs_within

# Of several signals the one listed last counts: a job whose time is up gets SIGUSR1 and SIGTERM, and is to be requeued.
SIGNALS = (
    *(signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGXCPU, signal.SIGTERM),
    *(signal.SIGUSR2, signal.SIGUSR1),
)
AGAIN = (signal.SIGINT, signal.SIGQUIT)  # as a second signal these end the run at once; others may be sent repeatedly


class _BySignal(BaseException):
    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Stopped(_BySignal, Exception):  # noqa: N818  # not an error: all ranks raise it at the same step
    """Stops all ranks at the same step after the signal ``signum`` to one of them."""


class Interrupted(_BySignal, KeyboardInterrupt):
    """The signal ``signum`` interrupts the launcher. ``except Exception`` does not catch it."""


_asked = 0
_process = 0
_at_end: list[Callable[[], None]] = []
_first = mmap.mmap(-1, 8)  # time of the first signal to this process; shared with its forked children


def begin() -> None:
    """Installs signal handlers at the start of a program, before its imports, which take seconds.

    A process that torchrun or srun started stops together with the other ranks. Any other process ends at once.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ:
        listen()
    else:
        end_at_once()


def end_at_once() -> None:
    """From now on a signal ends this process with a one-line error and exit code 128 + signal.

    For the time before a run begins, when there is nothing to save. The handler exits and does not raise: torch imports
    numpy from C++ code, which drops a KeyboardInterrupt.
    """
    if asked() and _process == os.getpid():
        _end(SIGNALS[_asked - 1], None)
    handle(_end)


def at_end(clean: Callable[[], None]) -> None:
    """Registers a function that the handler of :func:`end_at_once` calls before it ends the process."""
    _at_end.append(clean)


def listen() -> None:
    """From now on a signal sets the flag of this process. To be called in the main thread, before any other work.

    Signals that arrived while they were blocked (:func:`held`, ``env --block-signal``) are delivered now.
    """
    global _asked, _process, _first
    if _process != os.getpid():
        _asked, _process, _first = 0, os.getpid(), mmap.mmap(-1, 8)
        os.register_at_fork(after_in_child=_outlive_group)
    handle(_note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def done() -> None:
    """From now on SIGUSR1 and SIGUSR2, which warn of a time limit, are ignored: the work is done.

    Their default action would kill the process, which would change its exit code.
    """
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)


def ignore() -> None:
    """From now on no signal changes the exit code.

    A Python handler would not be enough: at exit Python restores the default action, which kills, for such signals.
    Ignored signals stay ignored.
    """
    handle(signal.SIG_IGN)


def asked() -> int:
    """The signal that asked this process to stop, as its index in ``SIGNALS``, from 1; 0 for none."""
    return _asked


def wait(seconds: float) -> bool:
    """Waits until a signal asks this process to stop, for at most so many seconds; whether one did."""
    deadline = time.monotonic() + seconds
    while not _asked and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(_asked)


def handle(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> dict[int, Any]:
    """Sets a handler for all ``SIGNALS``, except for an ignored SIGHUP (``nohup``). To be called in the main thread.

    Returns:
        The handlers that were replaced, by signal.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {each: signal.signal(each, handler) for each in SIGNALS if not (ignored and each == signal.SIGHUP)}


@contextmanager
def held() -> Iterator[None]:
    """Blocks ``SIGNALS`` within the context. A process that is started within it inherits the blocked signals.

    A signal to the whole process group, or to all processes of a service, then does not end such a helper process.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(signum: int, frame: FrameType | None) -> None:
    line = f"error: stopped by {signal.Signals(signum).name}\n"
    # os.write, because print() is not reentrant: the handler may have interrupted a print().
    with suppress(OSError):  # the reader of standard error may be gone
        os.write(2, line.encode())
    for clean in reversed(_at_end):
        with suppress(Exception):
            clean()
    os._exit(128 + signum)


def _note(signum: int, frame: FrameType | None) -> None:
    global _asked
    if os.getpid() == _process:  # data loader workers inherit this handler; they end with their rank
        if not _asked:
            _first[:] = struct.pack("d", time.monotonic())
        _asked = max(_asked, SIGNALS.index(signal.Signals(signum)) + 1)


def _outlive_group() -> None:
    """In a data loader worker, which a rank forks: ignores a SIGTERM unless the rank sent it.

    torch's workers end by any SIGTERM (``handler_SIGTERM`` in DataLoader.cpp, torch 2.13), and their rank then raises
    an error. A SIGTERM to the whole process group would thus make ranks fail that are about to stop with a checkpoint.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()
        start_programs_within(_unblocked)


@contextmanager
def _unblocked() -> Iterator[None]:
    """Unblocks SIGTERM. A program that a worker starts inherits the mask, and ``terminate()`` has to end it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _end_with_parent() -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == os.getppid():
            # The rank may have sent it to the whole process group. Then the rank got it too, just now.
            time.sleep(1)
            (asked,) = struct.unpack("d", _first[:])
            if not 0 < time.monotonic() - asked < 3:
                os._exit(0)  # as torch's handler does
