"""Signals that ask for a stop: what each process of a run does with them.

In a rank a signal sets a flag and nothing else; all ranks agree on it at the next step. A checkpoint that is saved
within a signal handler, as Lightning does it, catches each rank at another point: one waits for a collective that the
other never calls (Lightning issue 21406).
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

# The last of those that arrived wins: a job whose time is up (SIGUSR1) gets a SIGTERM as well, but is requeued.
SIGNALS = (
    *(signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGXCPU, signal.SIGTERM),
    *(signal.SIGUSR2, signal.SIGUSR1),
)
AGAIN = (signal.SIGINT, signal.SIGQUIT)  # a second one of these ends the run at once; others may be repeated


class Stopped(Exception):  # noqa: N818  # no error: all ranks raise it at the same step
    """All ranks stop here, since one of them was asked to.

    Attributes:
        signum: the signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Interrupted(KeyboardInterrupt):
    """A signal ends what the launching process is waiting for; no ``except Exception`` catches it.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


_asked = 0
_process = 0
_at_end: list[Callable[[], None]] = []
_first = mmap.mmap(-1, 8)  # when this process was first asked; its children see it


def begin() -> None:
    """Handles signals from the first line of a program on, before its imports, which take seconds.

    A process that torchrun or srun started stops together with the other ranks. Any other ends at once.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ:
        listen()
    else:
        end_at_once()


def end_at_once() -> None:
    """From now on a signal ends this process with one line and exit code 128 + signal: nothing is lost by it yet.

    The handler raises nothing. numpy is imported from torch's C++ code, which drops a KeyboardInterrupt.
    """
    if asked() and _process == os.getpid():
        _end(SIGNALS[_asked - 1], None)
    handle(_end)


def at_end(clean: Callable[[], None]) -> None:
    """Registers what :func:`end_at_once` calls before it ends the process."""
    _at_end.append(clean)


def listen() -> None:
    """From now on a signal sets the flag of this process. For the main thread, before any other work.

    A signal that came before, while it was blocked (:func:`held`, ``env --block-signal``), counts.
    """
    global _asked, _process, _first
    if _process != os.getpid():
        _asked, _process, _first = 0, os.getpid(), mmap.mmap(-1, 8)
        os.register_at_fork(after_in_child=_outlive_group)
    handle(_note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def done() -> None:
    """From now on a warning that the time is nearly up is ignored; by default it would kill what is about to end."""
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)


def ignore() -> None:
    """From now on no signal changes the exit code.

    At its end Python puts the default, which kills, in place of other handlers.
    """
    handle(signal.SIG_IGN)


def asked() -> int:
    """Which signal asked this process to stop, by its place in ``SIGNALS``, from 1; 0 for none."""
    return _asked


def handle(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> dict[int, Any]:
    """Sets a handler for all ``SIGNALS``, except for a SIGHUP that is ignored (``nohup``). For the main thread.

    Returns:
        The handlers that were replaced, by signal.
    """
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return {each: signal.signal(each, handler) for each in SIGNALS if not (ignored and each == signal.SIGHUP)}


@contextmanager
def held() -> Iterator[None]:
    """Blocks ``SIGNALS`` within the context; a process that is started within has them blocked for good.

    A signal to the whole process group, or to all processes of a service, then leaves such a helper alone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(signum: int, frame: FrameType | None) -> None:
    line = f"error: stopped by {signal.Signals(signum).name}\n"
    with suppress(OSError):  # nobody reads it any more; and print() must not be called in a handler
        os.write(2, line.encode())
    for clean in reversed(_at_end):
        with suppress(Exception):
            clean()
    os._exit(128 + signum)


def _note(signum: int, frame: FrameType | None) -> None:
    global _asked
    if os.getpid() == _process:  # loader workers inherit the handler; they end with their rank
        if not _asked:
            _first[:] = struct.pack("d", time.monotonic())
        _asked = max(_asked, SIGNALS.index(signal.Signals(signum)) + 1)


def _outlive_group() -> None:
    """In a process that a rank forked, a loader worker: a SIGTERM counts only if the rank sent it.

    torch's workers die of any other (``handler_SIGTERM`` in DataLoader.cpp, torch 2.13), and their rank raises for it.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()
        start_programs_within(_unblocked)


@contextmanager
def _unblocked() -> Iterator[None]:
    """A program that a loader worker starts within, a decoder, inherits the mask, so that ``terminate()`` ends it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _end_with_parent() -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == os.getppid():
            time.sleep(1)  # the rank may have sent it to the whole group, itself included
            (asked,) = struct.unpack("d", _first[:])
            if not 0 < time.monotonic() - asked < 3:
                os._exit(0)  # as torch's handler does
