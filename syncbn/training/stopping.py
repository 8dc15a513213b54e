"""A signal that asks a rank to stop sets a flag, and nothing else: what to do about it, all ranks decide together.

Saving a checkpoint within a signal handler, as Lightning does, catches each rank at another point; one then waits for a
message that the other will not send (Lightning issue 21406).
"""

import os
import signal
from types import FrameType

# The one further on goes before: a job whose time is up (SIGUSR1) gets a SIGTERM as well, but is to come back.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1)


class Stopped(Exception):  # noqa: N818  # no error: all ranks raise it at the same step
    """All ranks stop here, since one of them was asked to.

    Attributes:
        signum: the signal that asked.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


_asked = 0
_process = 0


def listen() -> None:
    """From now on a signal sets the flag of this process. For the main thread, before any other work.

    One that came before, and was blocked (``env --block-signal``), counts.
    """
    global _asked, _process
    if _process != os.getpid():
        _asked, _process = 0, os.getpid()
    for signum in SIGNALS:
        signal.signal(signum, _note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def done() -> None:
    """From now on word that the time is nearly up means nothing; by default it would kill what is about to end."""
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)


def asked() -> int:
    """Which signal asked this process to stop, by its place in ``SIGNALS``, from 1; 0 for none."""
    return _asked


def _note(signum: int, frame: FrameType | None) -> None:
    global _asked
    if os.getpid() == _process:  # loader workers inherit the handler; they end with their rank
        _asked = max(_asked, SIGNALS.index(signal.Signals(signum)) + 1)
