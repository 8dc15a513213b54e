"""The directory in which the processes of one launcher keep what is temporary: sockets, and W&B's directories.

A launcher removes its own at the end. After ``kill -9`` a surviving rank does, or else the next launcher on this
machine: a lock shows whether the owner still lives.
"""

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from syncbn.training.distributed import python_internals, signals

PREFIX = "syncbn-run-"
LONGEST_PARENT = 66  # bytes; below it come our directory (20), and the fork server's socket in it (19)
LONGEST = 60  # bytes; the path of a socket has at most 107, and W&B's adds 40

_mine: tuple[Path, FileLock, int] | None = None


def make() -> Path:
    """The directory of this process, made at the first call, and those of dead processes removed."""
    global _mine
    if _mine is None or _mine[2] != os.getpid():
        _sweep()
        draft = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=_parent()))
        lock = FileLock(draft / "lock")
        with suppress(OSError, NotImplementedError):  # a file system without locks
            lock.acquire(blocking=False)
        place = draft.with_name(draft.name.removeprefix("."))  # only now others may look at it
        draft.rename(place)
        _mine = place, lock, os.getpid()
        atexit.register(remove)
        signals.at_end(remove)
        python_internals.set_temporary_directory(str(place))  # else each child makes a pymp-* of its own
    return _mine[0]


def inherited() -> Path | None:
    """The directory that this process, or the one that started it, has made."""
    place = python_internals.temporary_directory()
    return Path(place) if place and Path(place).name.startswith(PREFIX) else None


def for_sockets() -> dict[str, str]:
    """``TMPDIR`` for a process that makes sockets there, if their paths would not be too long."""
    place = inherited()
    return {"TMPDIR": str(place)} if place is not None and len(os.fsencode(place)) <= LONGEST else {}


def remove() -> None:
    """Removes the directory, as the process that made it or in its place."""
    place = inherited()
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)


def _parent() -> Path:
    """The directory for temporary files; a short one where the fork server's socket would get too long a path."""
    place = Path(tempfile.gettempdir())
    return place if len(os.fsencode(place)) <= LONGEST_PARENT else Path("/tmp")


def _sweep() -> None:
    for place in _parent().glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout, NotImplementedError):
            if place.is_symlink() or place.stat().st_uid != os.getuid():
                continue
            with FileLock(place / "lock", blocking=False):
                shutil.rmtree(place, ignore_errors=True)
