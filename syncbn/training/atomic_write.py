"""Small files: written whole or not at all, never through a symbolic link; read with a line about what is wrong."""

import errno
import json
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from syncbn.training.config.schema import SettingError
from syncbn.training.console import printable

NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)  # file systems that flush no directory, or do not let us open it
DEPTH = 50  # objects within objects in a file of a run; settings have fewer than 10
ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EACCES: "this user may not write there: change the permissions (chmod), or use another directory",
    errno.EPERM: "this user may not change it, or it is immutable (lsattr, chattr -i): use another directory",
    errno.EROFS: "mount it writable, or use another directory",
    errno.EFBIG: "allow larger files (ulimit -f unlimited)",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOTDIR: "a part of this path is a file: remove that file, or use another directory",
    errno.EEXIST: "a file has this name: remove it, or use another directory",
    errno.EISDIR: "a directory has this name: move it away",
    errno.ENOTEMPTY: "a directory has this name: move it away",
    errno.ENOENT: "it was removed meanwhile: repeat the command, or use another directory",
    errno.EMFILE: "allow more open files (ulimit -n 1024)",
    errno.ENFILE: "this machine has too many open files: close some programs",
}


class DamagedError(SettingError):
    """A file is there, and its contents are not what was written."""


# What a run writes to without replacing it. Other files of a run directory are replaced, which replaces a link too.
APPENDED = ("metrics.csv", "statistics.csv", "gradients.csv", "wandb-lines.jsonl", "error.txt", "train.log")
FOLDERS = ("checkpoints", "ranks", "wandb")


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


def detach(run_dir: Path) -> list[str]:
    """Replaces symbolic links in a run directory, where writing to them would change files elsewhere.

    A link to a file becomes a copy. A link to a directory becomes a directory of links to what is in it, so that its
    checkpoints can be read, and neither replaced nor deleted. A broken link is removed.

    Returns:
        The names of what was a link.

    Raises:
        SettingError: a file that is written to is a pipe, a socket or a device.
    """
    for path in (run_dir / name for name in APPENDED):
        if path.exists() and not path.is_file():
            raise SettingError(f"{printable(path)}: this is no regular file, and the run writes to it; remove it")
    names = [name for name in (*APPENDED, *FOLDERS) if (run_dir / name).is_symlink()]
    for name in names:
        path, draft = run_dir / name, run_dir / f".{name}.part"
        if path.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            for each in sorted(path.resolve().iterdir()):
                (draft / each.name).symlink_to(each)
            path.unlink()  # a directory cannot replace a link
            draft.rename(path)
        elif path.is_file():
            shutil.copyfile(path, unlinked(draft))
            draft.replace(path)
        else:
            path.unlink()
    return names


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, whose numbers and depth are such that the rest of the program can compute with it.

    Raises:
        DamagedError: it holds something else; the message says what, without the name of the file.
        OSError: it cannot be read.
    """
    text = read_text(path)
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"is damaged (not JSON: {error})") from None
    if not isinstance(contents, dict):
        raise DamagedError(f"is damaged (it holds a {type(contents).__name__}, and should hold an object)")
    if wrong := out_of_range(contents):
        raise DamagedError(f"is damaged ({wrong})")
    return contents


def out_of_range(contents: Any, depth: int = 0) -> str:
    """What in JSON or YAML no file of a run has: numbers of more than 64 bits, or depth, as of an alias to itself."""
    if depth > DEPTH:
        return f"its objects are nested more than {DEPTH} deep"
    if isinstance(contents, int) and not -(2**63) <= contents < 2**63:
        return "it has a number of more than 64 bits"
    parts = contents.values() if isinstance(contents, dict) else contents if isinstance(contents, list) else ()
    return next((wrong for each in parts if (wrong := out_of_range(each, depth + 1))), "")


def read_text(path: Path) -> str:
    """The text of a file that is not empty.

    Raises:
        DamagedError: it is empty, or is not text.
        OSError: it cannot be read.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise DamagedError("is damaged (not text in UTF-8)") from None
    if not text.strip("\0 \t\r\n"):
        raise DamagedError("is damaged (empty)")
    return text


def read_bytes(path: Path) -> bytes:
    """The contents of a file. What is no file, such as a named pipe, is not waited for.

    Raises:
        DamagedError: it is a pipe, a socket or a device.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # a pipe would wait
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DamagedError("is damaged (it is no regular file)")
        return file.read()


def explain(error: OSError, path: Path) -> str:
    """One line: which file, what the system says about it, and what to do.

    Args:
        error: as it was raised.
        path: the file, where the error names none.
    """
    named = error.filename2 or error.filename  # the second is what a file was to be renamed to
    at = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else path
    said = error.strerror or str(error)
    if error.errno == errno.EMFILE:
        said += f", ulimit -n is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        said += f", {free(at)}"
    return f"{printable(at)}: {said}; {ADVICE.get(error.errno or 0, 'use another directory')}"


def free(path: Path) -> str:
    """How much room there is beside a file, as a part of a line; empty where the system does not tell."""
    try:
        found = os.statvfs(next(each for each in path.absolute().parents if each.is_dir()))
    except (OSError, StopIteration):
        return ""
    inodes = " and no inode" if found.f_files and not found.f_favail else ""  # some file systems count none
    return f"{found.f_bavail * found.f_frsize / 2**20:,.0f} MiB{inodes} are free there"
