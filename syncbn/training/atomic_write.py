"""Writes small files atomically: whole or not at all, and never through a symbolic link."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Errors of file systems that cannot flush a directory, or do not allow to open it.
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a draft to write, and renames the draft to ``path`` at the end of the context.

    If the draft cannot be written, it is removed and the old file is unchanged. The draft is flushed to the disk before
    it is renamed, and the directory after that. So a power cut leaves the old file or the new one, never an empty one.
    A killed process may leave its draft; the next draft for the same ``path`` has the same name and overwrites it.
    """
    draft = unlinked(path.with_name(f".{path.name}"))
    try:
        yield draft
        flush(draft)
        draft.replace(path)
        flush(path.parent)
    except OSError:  # no space left, for example
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def unlinked(path: Path) -> Path:
    """Removes a symbolic link at ``path``, through which a write would change a file elsewhere; returns ``path``."""
    if path.is_symlink():
        path.unlink()
    return path


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are written to the disk (fsync)."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FLUSH):
            raise
