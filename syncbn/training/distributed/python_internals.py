"""The private parts of Python's library that syncbn needs; no other module of syncbn reaches for one.

Each was read in CPython 3.11. ``tests/training/distributed/test_python_internals.py`` fails, with the name of the
attribute, when a later Python has moved one.
"""

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import process
from typing import Any

_execute_child = subprocess.Popen._execute_child  # type: ignore[attr-defined]


def fork_server_pid() -> int | None:
    """The process of multiprocessing's fork server; None where this process has started none.

    ``multiprocessing.forkserver._forkserver._forkserver_pid``, CPython 3.11. The public functions start the server, and
    none reports it.
    """
    from multiprocessing import forkserver

    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def set_temporary_directory(path: str) -> None:
    """Sets where multiprocessing puts its sockets, in this process and all that it will start.

    ``multiprocessing.process.current_process()._config``, CPython 3.11. ``multiprocessing.util.get_temp_dir`` makes a
    directory of its own in each process, and cannot be given one.
    """
    process.current_process()._config["tempdir"] = path  # type: ignore[attr-defined]


def temporary_directory() -> str | None:
    """What :func:`set_temporary_directory` has set in this process or in the one that started it.

    ``multiprocessing.process.current_process()._config``, CPython 3.11. ``multiprocessing.util.get_temp_dir`` would
    make a directory.
    """
    found: str | None = process.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    return found


def start_programs_within(context: Callable[[], AbstractContextManager[None]]) -> None:
    """Has ``subprocess`` start each program of this process within ``context()``, which the program inherits from.

    ``subprocess.Popen._execute_child``, CPython 3.11. ``preexec_fn`` is the caller's, and here the callers are
    libraries that decode images or videos.
    """

    def execute_child(popen: subprocess.Popen[Any], *args: Any) -> None:
        with context():
            _execute_child(popen, *args)

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
