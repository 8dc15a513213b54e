"""The process that ranks are forked from, multiprocessing's fork server, which has imported everything once."""

import atexit
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker

from syncbn.training.distributed import server_imports, temporary_directory
from syncbn.training.distributed import signals as stopping
from syncbn.training.distributed.python_internals import fork_server_pid

_modules: list[str] = []  # what the server imports; one that is started again, after its end, imports the same


def start_server(*modules: str) -> None:
    """Starts the process that ranks are forked from, if it is not running yet, and does not wait for it.

    Args:
        modules: which it imports, so that ranks need not. A later call without any imports those of the first call.
    """
    if not can_fork() or _server_lives():
        return
    # A process that has asked CUDA anything must not fork. Asked through NVML, "is there a GPU" asks CUDA nothing.
    environment = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # It ends by SIGKILL, and leaves what W&B's import makes there.
    environment["TMPDIR"] = str(temporary_directory.make())
    if modules:
        _modules[:] = modules
        multiprocessing.get_context("forkserver").set_forkserver_preload([server_imports.__name__])
        stopping.at_end(_end_server)
        atexit.register(_end_server)
    environment[server_imports.VARIABLE] = ",".join(_modules)
    start_tracker()
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)  # and it is to import what this process would
    try:
        with stopping.held():
            forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def start_tracker() -> None:
    """Starts multiprocessing's resource tracker where no signal to the group reaches it.

    It ignores two signals itself, and unblocks these in this process (CPython 3.11), so it comes before any other.
    """
    with stopping.held():
        resource_tracker.ensure_running()


def _server_lives() -> bool:
    pid = fork_server_pid()
    with suppress(ChildProcessError):
        return pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    return False


def _end_server() -> None:
    """It would end by itself, but only when its imports are done."""
    pid = fork_server_pid()
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def can_fork() -> bool:
    """Not so on Windows."""
    return "forkserver" in multiprocessing.get_all_start_methods()
