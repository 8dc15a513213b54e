"""The private parts of Python's library that syncbn needs; no other module uses them.

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
    """The process id of multiprocessing's fork server; None if this process has started none.

    ``multiprocessing.forkserver._forkserver._forkserver_pid``, CPython 3.11. The public functions start the server, and
    none returns its process id.
    """
    from multiprocessing import forkserver

    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def set_temporary_directory(path: str) -> None:
    """Sets the directory of multiprocessing's sockets, in this process and in those that it starts later.

    ``multiprocessing.process.current_process()._config``, CPython 3.11. ``multiprocessing.util.get_temp_dir`` creates
    a new directory in each process and takes no argument.
    """
    process.current_process()._config["tempdir"] = path  # type: ignore[attr-defined]


def temporary_directory() -> str | None:
    """The directory that :func:`set_temporary_directory` has set in this process or its parent; None without one.

    ``multiprocessing.process.current_process()._config``, CPython 3.11. ``multiprocessing.util.get_temp_dir`` would
    create a directory.
    """
    found: str | None = process.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    return found


def start_programs_within(context: Callable[[], AbstractContextManager[None]]) -> None:
    """Makes ``subprocess`` start each program of this process within ``context()``, so that it inherits that state.

    ``subprocess.Popen._execute_child``, CPython 3.11. The public ``preexec_fn`` is an argument of each call, and the
    calls here are in libraries that decode images or videos.
    """

    def execute_child(popen: subprocess.Popen[Any], *args: Any) -> None:
        with context():
            _execute_child(popen, *args)

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]
