"""Creates and removes the temporary directory of one launcher and its ranks, for sockets and W&B's directories.

A launcher removes its directory at exit. After ``kill -9`` a surviving rank removes it, or else the next launcher on
this machine. A lock shows whether the owner still lives.
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
# A socket's path has at most 107 bytes.
LONGEST_PARENT = 66  # bytes; our directory adds 20, and the fork server's socket in it 19
LONGEST = 60  # bytes; W&B's socket adds 40

_mine: tuple[Path, FileLock, int] | None = None


def make() -> Path:
    """The directory of this process. The first call creates it, and removes the directories of dead processes."""
    global _mine
    if _mine is None or _mine[2] != os.getpid():
        _remove_abandoned()
        draft = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=_parent()))
        lock = FileLock(draft / "lock")
        # filelock 3.16 raises NotImplementedError on a file system without flock. There no process can tell whether the
        # owner lives, so _remove_abandoned() removes nothing.
        with suppress(OSError, NotImplementedError):
            lock.acquire(blocking=False)
        # The draft's name does not match the glob of _remove_abandoned(), which would remove an unlocked directory.
        place = draft.with_name(draft.name.removeprefix("."))
        draft.rename(place)
        _mine = place, lock, os.getpid()
        atexit.register(remove)
        signals.at_end(remove)
        python_internals.set_temporary_directory(str(place))  # otherwise each child process creates a pymp-* directory
    return _mine[0]


def inherited() -> Path | None:
    """The directory that this process or its parent has created; None if there is none."""
    place = python_internals.temporary_directory()
    return Path(place) if place and Path(place).name.startswith(PREFIX) else None


def for_sockets() -> dict[str, str]:
    """``TMPDIR`` for a process that creates sockets in it; empty if their paths would be too long."""
    place = inherited()
    return {"TMPDIR": str(place)} if place is not None and len(os.fsencode(place)) <= LONGEST else {}


def remove() -> None:
    """Removes the directory. A rank calls this too, if the launcher that created the directory was killed."""
    place = inherited()
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)


def _parent() -> Path:
    """The system's directory for temporary files, or ``/tmp`` if the fork server's socket would get too long a path."""
    place = Path(tempfile.gettempdir())
    return place if len(os.fsencode(place)) <= LONGEST_PARENT else Path("/tmp")


def _remove_abandoned() -> None:
    """Removes this user's directories whose owners no longer hold the lock."""
    for place in _parent().glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout, NotImplementedError):
            if place.is_symlink() or place.stat().st_uid != os.getuid():
                continue
            with FileLock(place / "lock", blocking=False):
                shutil.rmtree(place, ignore_errors=True)
