"""Lets a run import the user's own Python files without PYTHONPATH.

A ``_target_`` may name a class in a file of the current directory, of the directory that ``--config-dir`` names, or of
the directory that this one lies in. These directories are not in ``sys.path``: Hydra would execute ``hydra_plugins/``
there, and a library that tries whether ``dill`` is installed would execute the user's ``dill.py``. Instead, a finder
that Python asks last serves only the modules that the user's settings name, and what files of these directories import.
"""

import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

VARIABLE = "SYNCBN_OWN_DIRECTORIES"  # passes the directories to the fork server
NAMED = re.compile(r"""_target_["']?\s*[=:]\s*["']?([A-Za-z_]\w*)""")
FILES = ("*.yaml", "*/*.yaml", "hydra/*/*.yaml")  # below --config-dir
PASSED = rf"importlib(\..*)?|_frozen_importlib(_external)?|{re.escape(__name__)}"  # modules between an import and here
NEVER = "hydra_plugins"  # Hydra executes everything in it

_added: list[str] = []
_names: set[str] = set()


class _OwnFiles(MetaPathFinder):
    """Finds the user's modules, after all other finders."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is not None or not (fullname in _names or _is_asked_by_own_file()):
            return None
        return find(fullname)


_FINDER = _OwnFiles()


def add(arguments: Sequence[str]) -> None:
    """Makes the user's directories importable, for the modules that the user's settings name.

    Args:
        arguments: of the command line.
    """
    here = Path.cwd()
    config_dir = config_directory(arguments)
    directories = [here, *([] if config_dir is None else [config_dir.parent, config_dir])]
    _install([str(each) for each in directories if each.is_dir() and not _is_of_run(each)])
    # The settings of a job are composed later, but Hydra calls targets in its own settings before.
    _names.update(NAMED.findall("\n".join([*arguments, *_texts(config_dir)])))


def allow(tree: Any) -> None:
    """Makes the modules importable that the targets in these settings name.

    Args:
        tree: settings of the user's, never those of another run that have not been checked.
    """
    if isinstance(tree, dict):
        target = str(tree.get("_target_", ""))
        words = [target, str(tree.get("path", "")) if target.startswith("hydra.utils.get_") else ""]
        _names.update(filter(None, (each.partition(".")[0] for each in words)))
    for each in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        allow(each)


def find(name: str) -> ModuleSpec | None:
    """The user's module of this name, without importing it; None if there is none."""
    return None if name == NEVER or not _added else PathFinder.find_spec(name, _added)


def exported() -> dict[str, str]:
    """The environment variable that :func:`receive` reads in another process."""
    return {VARIABLE: json.dumps(_added)}


def receive() -> None:
    """Makes the directories importable that the process that started this one has added."""
    _install(json.loads(os.environ.get(VARIABLE, "[]")))


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


def _install(directories: list[str]) -> None:
    _added.extend(each for each in dict.fromkeys(directories) if each not in _added and each not in sys.path)
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def _texts(config_dir: Path | None) -> Iterator[str]:
    for pattern in FILES if config_dir is not None else ():
        for path in config_dir.glob(pattern) if config_dir is not None else ():
            with suppress(OSError):
                if not _is_of_run(path.parent):
                    yield path.read_text(encoding="utf-8", errors="replace")


def _is_asked_by_own_file() -> bool:
    """Whether the ``import`` that is being executed, or the call of ``import_module``, stands in a file of the user's.

    Python's own functions are skipped: they lie between it and the finder.
    """
    frame = inspect.currentframe()
    while frame is not None and re.fullmatch(PASSED, str(frame.f_globals.get("__name__"))):
        frame = frame.f_back
    return frame is not None and is_added(frame.f_code.co_filename)


def _is_installed(file: str) -> bool:
    """Whether the file also lies below an entry of ``sys.path`` within these directories: a project's environment."""
    within = [each for each in sys.path if each and any(Path(each).is_relative_to(own) for own in _added)]
    return any(Path(file).is_relative_to(each) for each in within)


def _is_of_run(directory: Path) -> bool:
    """Whether this is a run directory, or lies in one. ``mode=test`` of a foreign run must not execute its files."""
    return any((each / "run.json").exists() or _has_checkpoints(each) for each in _with_parents(directory))


def _with_parents(directory: Path) -> Iterator[Path]:
    for path in (directory, directory.resolve()):
        yield path
        yield from path.parents


def _has_checkpoints(directory: Path) -> bool:
    return (directory / "config.yaml").exists() and (directory / "checkpoints").is_dir()
