"""Selects parts of a network by globs on their names."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from syncbn.training.errors import SettingError

SHOWN = 3  # names that an error message lists


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a glob matches this name, or the name of a module that it is part of."""
    return any(fnmatchcase(each, glob) for each in (name, *parents(name)) for glob in globs)


def parents(name: str) -> Iterator[str]:
    """The names of the modules that a name is part of, the nearest first: ``a.b`` and ``a`` of ``a.b.weight``."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def refuse_unmatched(setting: str, globs: Sequence[str], names: Sequence[str]) -> None:
    """Raise for the first glob that matches none of the names.

    Raises:
        SettingError: the hint has the nearest names.
    """
    for glob in globs:
        if not any(matches(name, [glob]) for name in names):
            raise SettingError(setting, glob, f"no part of the network has this name; {nearest(glob, names)}")


def nearest(wanted: str, names: Sequence[str]) -> str:
    """The names that are most like ``wanted``, in words."""
    known = list(dict.fromkeys(each for name in names for each in (name, *parents(name)) if each))
    found = get_close_matches(wanted.strip("*"), known, n=SHOWN, cutoff=0.4)
    return f"the nearest are {', '.join(found or known[:SHOWN])}"
