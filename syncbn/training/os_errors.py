"""Explains an OSError in one line: the file, what the system reports, and what to do."""

import errno
import os
import resource
from pathlib import Path

from syncbn.training.console import printable

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


def explain(error: OSError, path: Path) -> str:
    """Explains an error in one line: the file, the system's message, and what to do.

    Args:
        error: as it was raised.
        path: of the file, used if the error names none.
    """
    named = error.filename2 or error.filename  # filename2 is the target of a rename
    at = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else path
    reason = error.strerror or str(error)
    if error.errno == errno.EMFILE:
        reason += f", ulimit -n is {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason += f", {free(at)}"
    return f"{printable(at)}: {reason}; {ADVICE.get(error.errno or 0, 'use another directory')}"


def free(path: Path) -> str:
    """The free space on the file system of a file, as a part of a line; empty if it is unknown."""
    try:
        found = os.statvfs(next(each for each in path.absolute().parents if each.is_dir()))
    except (OSError, StopIteration):
        return ""
    inodes = " and no inode" if found.f_files and not found.f_favail else ""  # some file systems count none
    return f"{found.f_bavail * found.f_frsize / 2**20:,.0f} MiB{inodes} are free there"
