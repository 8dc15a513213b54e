"""Finds the run directories below a directory: those of single runs, sweeps and studies."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from syncbn.training.errors import SettingError

DEFAULTS = ("outputs", "multirun", "studies")  # where train.py, its sweeps and its studies make run directories
DEEPEST = 12  # levels of directories that are searched; a job of a sweep of a study lies 3 deep
NUMBER = re.compile("[0-9]+")


class Found(NamedTuple):
    """A run directory, or a directory that cannot be read."""

    path: str
    names: frozenset[str]  # of its files
    error: str = ""  # why it cannot be read


def find(roots: Iterable[Path]) -> list[Found]:
    """The run directories at and below ``roots``, each once, sorted by path.

    A run directory is not searched for others. Hidden directories are skipped. A symbolic link to a run directory
    counts as that run; a link to any other directory is not followed.

    Raises:
        SettingError: a root is not a directory.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Found] = []
    for root in roots:
        if not root.is_dir():
            what = "this is a file" if root.exists() else "there is no such directory"
            raise SettingError("DIR", root, f"{what}; use a directory that holds runs, such as outputs")
        links: list[str] = []
        found += _below(str(root), 0, seen, links)
        found += [each for link in links for each in _linked(link, seen)]
    return sorted(found, key=lambda each: natural(each.path))


def roots(directories: Iterable[Path]) -> list[Path]:
    """The given directories, or those of ``DEFAULTS`` that exist in the working directory.

    Raises:
        SettingError: none is given, and none exists.
    """
    given = list(directories) or [Path(name) for name in DEFAULTS if Path(name).is_dir()]
    if not given:
        names = f"{', '.join(DEFAULTS[:-1])} or {DEFAULTS[-1]}"
        raise SettingError("DIR", hint=f"there is no {names} here; name a directory that holds runs")
    return given


def natural(text: str) -> list[tuple[str, int]]:
    """A sort key that puts job 10 after job 9."""
    return [(word, int(number or -1)) for word, number in re.findall(r"(\D*)(\d{0,18})", text)]


def is_run(path: str, names: frozenset[str]) -> bool:
    """Whether a directory with these entries is that of a run.

    A job of a sweep that failed early has only Hydra's files.
    """
    if "run.json" in names or "result.json" in names:
        return True
    if "config.yaml" in names and "checkpoints" in names:  # its run.json is lost
        return True
    return ".hydra" in names and NUMBER.fullmatch(os.path.basename(path)) is not None  # noqa: PTH119


def _below(path: str, depth: int, seen: set[tuple[int, int]], links: list[str]) -> Iterator[Found]:
    """The runs at and below a directory; symbolic links to directories are added to ``links``."""
    names, below = [], []
    try:
        if not _is_new(path, seen):
            return
        with os.scandir(path) as entries:
            for entry in entries:
                names.append(entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    links.append(entry.path)
                elif entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
    except OSError as error:  # a directory of another user, for example
        yield Found(path, frozenset(), error.strerror or str(error))
        return
    kinds = frozenset(names)
    if is_run(path, kinds):
        del links[len(links) - sum(link.startswith(f"{path}/") for link in links) :]  # those within it
        yield Found(path, kinds)
    elif depth < DEEPEST:
        for each in below:
            yield from _below(each, depth + 1, seen, links)


def _linked(link: str, seen: set[tuple[int, int]]) -> Iterator[Found]:
    try:
        names = frozenset(each.name for each in os.scandir(link))
        if is_run(link, names) and _is_new(link, seen):
            yield Found(link, names)
    except OSError:  # a link to a file, or to nothing
        return


def _is_new(path: str, seen: set[tuple[int, int]]) -> bool:
    about = os.stat(path)  # noqa: PTH116
    place = about.st_dev, about.st_ino
    is_new = place not in seen
    seen.add(place)
    return is_new
