"""Starts multiprocessing's fork server, from which ranks are forked, and has it import their modules once."""

import atexit
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker

from syncbn.training import import_paths
from syncbn.training.distributed import signals as stopping
from syncbn.training.distributed.python_internals import fork_server_pid
from syncbn.training.processes import server_imports, temporary_directory

_modules: list[str] = []  # that the server imports; if it ended and is started again, it imports the same


def start_server(*modules: str) -> None:
    """Starts the fork server if it is not running, without waiting for its imports.

    Args:
        modules: that the server imports, so that ranks need not. Without any, those of the first call.
    """
    if _server_lives():
        return
    # After a process has initialized CUDA, its forked children cannot use it. With this variable,
    # torch.cuda.is_available() asks NVML and does not initialize CUDA.
    environment = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # The server and the tracker are python -c, which would import a random.py of the current directory before Python's.
    environment["PYTHONSAFEPATH"] = "1"
    # The server is ended by SIGKILL, so it never removes the temporary files that the import of W&B creates.
    environment["TMPDIR"] = str(temporary_directory.make())
    if modules:
        _modules[:] = modules
        multiprocessing.get_context("forkserver").set_forkserver_preload([server_imports.__name__])
        stopping.at_end(_end_server)
        atexit.register(_end_server)
    environment[server_imports.VARIABLE] = ",".join(_modules)
    environment |= import_paths.exported()
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)  # PYTHONPATH: the server has to find the same modules as this process
    try:
        start_tracker()
        with stopping.held():
            forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def start_tracker() -> None:
    """Starts multiprocessing's resource tracker with all stop signals blocked, so that a group signal does not end it.

    CPython 3.11: starting the tracker unblocks SIGINT and SIGTERM in this process, so it is started before the server.
    """
    with stopping.held():
        resource_tracker.ensure_running()


def _server_lives() -> bool:
    """Whether the server runs; WNOWAIT leaves its exit status to multiprocessing."""
    pid = fork_server_pid()
    with suppress(ChildProcessError):
        return pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


def _end_server() -> None:
    """Ends the fork server at once; otherwise it would end only after its imports."""
    pid = fork_server_pid()
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
