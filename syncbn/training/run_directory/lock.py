"""Locks a run directory, so that only one process at a time works in it."""

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from syncbn.training.atomic_write import unlinked
from syncbn.training.console import printable
from syncbn.training.errors import SettingError

HELD = " is running this run already"  # in the error, after the name of the process

_held: dict[Path, int] = {}  # open lock files; the kernel releases their locks when this process ends, even by SIGKILL


def hold(run_dir: Path) -> None:
    """Locks the run directory for this process until :func:`release` or the end of the process.

    On a file system without locks this does nothing.

    Raises:
        SettingError: another process holds the lock.
        OSError: the directory cannot be created.
    """
    patience = 5
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = _open_lock(run_dir)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(file, run_dir / ".lock"):
                break
        except BlockingIOError:
            if not patience:
                holder = os.read(file, 200).decode(errors="replace") or "another process"
                os.close(file)
                raise SettingError(
                    "run.id", run_dir.name, f"{printable(holder)}{HELD}; wait for it, or stop it"
                ) from None
            time.sleep(0.05)  # another process may only be checking the lock (is_held), which takes a moment
        except OSError:  # a file system without locks
            os.close(file)
            return
        patience -= 1
        os.close(file)  # also if release() in another process has just removed this lock file: the next try makes one
    with suppress(OSError):  # no space left, or read-only; the lock is held even without the note
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    _held[run_dir] = file


def release(run_dir: Path) -> None:
    """Unlocks the run directory. If it contains nothing but the lock file, that file is removed."""
    if run_dir not in _held:
        return
    file = _held.pop(run_dir)
    with suppress(OSError):
        if [path.name for path in run_dir.iterdir()] == [".lock"]:
            (run_dir / ".lock").unlink()
        os.truncate(file, 0)
    os.close(file)


def is_held(run_dir: Path) -> bool | None:
    """Whether a process holds the lock of this run.

    Returns:
        None if that is unknown: without a lock file, as in a copy, or on a file system without locks.
    """
    try:
        file = os.open(run_dir / ".lock", os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for a writer
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)
    return False


def _open_lock(run_dir: Path) -> int:
    path = run_dir / ".lock"
    try:
        return os.open(unlinked(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not path.exists():
            raise
        # The results of a finished run can be shown from a read-only directory too.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _is_same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
