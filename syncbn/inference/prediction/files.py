"""Lists the image files to predict, each once and in a fixed order."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from syncbn.training.console import printable
from syncbn.training.data.images import listing
from syncbn.training.errors import SettingError
from syncbn.training.read_file import DamagedError, read_bytes


class Files(NamedTuple):
    """The image files.

    Attributes:
        paths: as they were given, or below a given folder; sorted within each folder.
        unreadable: folders that cannot be read, each with the reason.
        ignored: number of files in the folders that have no suffix of an image.
    """

    paths: list[str]
    unreadable: list[tuple[str, str]]
    ignored: int


def listed(given: Sequence[Path], file: Path | None = None) -> Files:
    """The images among files and folders.

    Nested folders are searched, symbolic links are followed, hidden files are skipped. A file that is named itself is
    taken with any suffix.

    Args:
        given: files and folders.
        file: a text file with a path on each line; more of them.

    Raises:
        SettingError: one of them does not exist, or there is no image.
    """
    paths: dict[str, str] = {}
    unreadable: list[tuple[str, str]] = []
    ignored = 0
    for each in [*given, *([] if file is None else _lines(file))]:
        if each.is_dir():
            found, other = listing.below(
                each, lambda error: unreadable.append((str(error.filename), error.strerror or str(error)))
            )
            ignored += other
        elif each.exists() or each.is_symlink():
            found = [str(each)]
        else:
            raise SettingError("FOLDER", printable(each), "there is no such file or directory")
        for path in found:
            paths.setdefault(os.path.abspath(path), path)  # noqa: PTH100  # one file may be given twice
    if not (paths or unreadable):
        others = listing.of_other_files(ignored)
        suffixes = ", ".join(sorted(listing.SUFFIXES)[:6])
        where = " ".join(printable(each) for each in given) or str(file)
        raise SettingError("FOLDER", where, f"there is no image in it{others}; images have the suffix {suffixes}, ...")
    return Files(list(paths.values()), unreadable, ignored)


def _lines(file: Path) -> list[Path]:
    try:
        lines = read_bytes(file).splitlines()
    except OSError as error:
        raise SettingError("--files-from", file, error.strerror or str(error)) from error
    except DamagedError as error:
        raise SettingError("--files-from", file, "this is no regular file") from error
    return [Path(os.fsdecode(line)) for line in lines if line.strip()]
