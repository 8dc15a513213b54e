"""Lets a run import the user's own Python files without PYTHONPATH.

A ``_target_`` may name a class in a file of the current directory, of the directory that ``--config-dir`` names, or of
the directory that this one lies in. These directories come last in ``sys.path``: a run creates ``wandb/`` in the
current directory, and no file there may replace a module of Python or an installed package.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from syncbn.training import program

_added: list[str] = []


def add(arguments: Sequence[str]) -> None:
    """Appends the user's directories to ``sys.path``. Ranks get the ``sys.path`` of the process that starts them.

    Args:
        arguments: of the command line.
    """
    here = Path.cwd()
    config_dir = config_directory(arguments)
    directories = [here, *([] if config_dir is None else [config_dir.parent, config_dir])]
    for each in directories:
        if str(each) not in sys.path and each.is_dir() and not _is_of_run(each):
            sys.path.append(str(each))
            _added.append(str(each))


def begin() -> None:
    """Removes the current directory from the front of ``sys.path``, where ``python -m`` puts it, before the imports."""
    here = Path.cwd()
    if program.is_module() and sys.path[0] == str(here) and not (here / "syncbn").is_dir():
        del sys.path[0]


def config_directory(arguments: Sequence[str]) -> Path | None:
    """The absolute path of the directory that ``--config-dir`` names, as Hydra parses it; None without it."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=False):
        option, equals, value = argument.partition("=")
        if option in ("--config-dir", "-cd"):
            found = value if equals else following
    return None if found is None else Path.cwd() / found


def is_added(file: str | None) -> bool:
    """Whether a module's file lies in a directory that only :func:`add` made importable."""
    return file is not None and any(Path(file).is_relative_to(each) for each in _added) and not _is_installed(file)


def _is_installed(file: str) -> bool:
    """Whether the file also lies below an entry of ``sys.path`` that was there before: an environment in a project."""
    return any(Path(file).is_relative_to(each) for each in sys.path if each and each not in _added)


def _is_of_run(directory: Path) -> bool:
    """Whether this is a run directory, or lies in one. ``mode=test`` of a foreign run must not execute its files."""
    return any((each / "run.json").exists() or _has_checkpoints(each) for each in _with_parents(directory))


def _with_parents(directory: Path) -> Iterator[Path]:
    for path in (directory, directory.resolve()):
        yield path
        yield from path.parents


def _has_checkpoints(directory: Path) -> bool:
    return (directory / "config.yaml").exists() and (directory / "checkpoints").is_dir()
