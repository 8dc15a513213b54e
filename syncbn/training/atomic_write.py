"""Small files: written whole or not at all, never through a symbolic link; read with a line about what is wrong."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # file systems that flush no directory, or do not let us open it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, which then takes the place of ``path``; one that cannot be written leaves the old file alone.

    It is flushed to the disk before it is renamed, and the directory after that: a power cut leaves the old file or the
    new one, and no empty one. A process that is killed may leave the draft, under one name for each ``path``: the next
    one writes over it.
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
    """``path``, to be written. A symbolic link there is removed: writing to it would change a file elsewhere."""
    if path.is_symlink():
        path.unlink()
    return path


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FLUSH):
            raise
