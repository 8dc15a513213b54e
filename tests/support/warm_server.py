"""A server that has imported what the tests run, and forks a process for each request of ``warm_process.py``.

A request is one message over a Unix socket: a JSON object, with standard input, output and error beside it. The answers
are the process's id, and its wait status once it has ended. The process leads a session of its own, and what Python's
multiprocessing starts in it, the server that ranks are forked from among it, is a fork of that. So it is spared five to
eight seconds of imports, and is as one from a shell in all else: it can be killed, and leaves behind what it would.
"""

import atexit
import ctypes
import gc
import json
import os
import re
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from contextlib import suppress
from functools import cache
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

import hypothesis  # noqa: F401
import lightning.fabric.utilities.rank_zero as rank_zero
import pytest  # noqa: F401
import torch
import torch._inductor.compile_fx  # noqa: F401  # 1.5 seconds of each process that compiles
import torch.distributed.run  # noqa: F401
import torch.export._trace  # noqa: F401  # the same
import wandb.sdk.launch  # noqa: F401
from hydra._internal.hydra import Hydra
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from wandb.sdk.data_types._private import MEDIA_TMP

import syncbn.training.data.digits  # noqa: F401  # it imports scikit-learn, which takes a second
import syncbn.training.launch.job  # noqa: F401
import syncbn.training.launch.rank  # noqa: F401
from syncbn.training.composition import signatures
from tests.support import read_once
from tests.support.warm_process import LARGEST, NAMESPACES, REPO, WarmProcess

SPACES = (("user", 0x10000000), ("mnt", 0x00020000))  # with CLONE_NEWUSER and CLONE_NEWNS of <sched.h>


get_mode = Hydra.get_mode


def serve(address: str) -> None:
    """Answers requests until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that watch
    settings = [path.read_text(encoding="utf-8") for path in REPO.glob("conf/**/*.yaml")]
    signatures._of = cache(signatures._of)  # 0.1 seconds of each run
    for target in (signatures.TRAINER, *re.findall(r"_target_: (\S+)", "\n".join(settings))):
        signatures.arguments(target)
    read_once.install()  # 0.04 seconds
    for path in REPO.glob("conf/**/*.yaml"):
        name = str(path.relative_to(REPO / "conf").with_suffix(""))
        read_once.parsed("main", f"{REPO}/conf", name, path.stat().st_mtime_ns)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        Path(f"{address}.new").rename(address)  # who sees it may connect
        gc.freeze()
        while sys.stdin.fileno() not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                watch(connection, address)
            connection.close()


def watch(connection: socket.socket, address: str) -> NoReturn:
    """Forks the process, and tells how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, LARGEST, 3)
    pid = os.fork()
    if pid == 0:
        begin(json.loads(message), streams, address)
    close_all_but(connection.fileno())
    with suppress(OSError):  # who asked may be gone
        connection.send(b"%d" % pid)
        connection.send(b"%d" % os.waitpid(pid, 0)[1])
    os._exit(0)


def begin(request: dict[str, Any], streams: list[int], address: str) -> NoReturn:
    """Runs the program, and ends as the interpreter would, but takes nothing apart that is imported: a second less."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    close_all_but(0, 1, 2)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    if NAMESPACES in request["environment"]:
        join(request["environment"].pop(NAMESPACES))
    set_environment(request["environment"])
    os.chdir(request["where"])
    warnings.resetwarnings()
    MEDIA_TMP._finalizer.detach()  # type: ignore[attr-defined]  # else each fork removes the server's at its end
    # beside the socket: TMPDIR is what some tests look into after a kill
    MEDIA_TMP.__init__("wandb-media", dir=Path(address).parent)  # type: ignore[misc]
    atexit.register(MEDIA_TMP.cleanup)
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=request["unbuffered"])  # type: ignore
    util.spawnv_passfds = forked
    Hydra.get_mode = mode  # type: ignore[method-assign]  # 0.2 seconds of each call
    WarmProcess.address, subprocess_handler.Popen = address, WarmProcess  # torchrun starts its ranks by this
    code = 1
    try:
        run(request["program"], request["arguments"])
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """For ``Hydra.get_mode``, which composes all settings once more, to see whether they have a ``hydra.mode``."""
    return get_mode(hydra, config_name, overrides) if "hydra.mode" in " ".join(overrides) else None


def join(process: str) -> None:
    """Joins the user and mount namespaces of a process, as ``nsenter --user --mount`` does."""
    library = ctypes.CDLL(None, use_errno=True)
    files = [(os.open(f"/proc/{process}/ns/{name}", os.O_RDONLY), kind) for name, kind in SPACES]
    for file, kind in files:
        if library.setns(file, kind):
            raise OSError(ctypes.get_errno(), f"namespaces of process {process}")
        os.close(file)


def set_environment(environment: dict[str, str]) -> None:
    """Sets the variables, and what has been read from some of them at imports."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[1:1] = [
        each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each not in (*sys.path, "")
    ]
    tempfile.tempdir = None  # as TMPDIR says
    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))


def run(program: str, arguments: list[str]) -> None:
    """``python PROGRAM`` or ``python -m PROGRAM``."""
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def forked(path: str, arguments: list[str], descriptors: list[int]) -> int:
    """For ``multiprocessing.util.spawnv_passfds``: runs ``python -c CODE ARGUMENTS`` in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            close_all_but(0, 1, 2, *descriptors)
            _, program, *sys.argv[1:] = arguments[arguments.index("-c") :]
            exec(program, {"__name__": "__main__"})
            code = 0
        finally:
            os._exit(code)
    return pid


def close_all_but(*descriptors: int) -> None:
    for each in {int(path.name) for path in Path("/dev/fd").iterdir()} - set(descriptors):
        with suppress(OSError):  # that of the listing itself
            os.close(each)


if __name__ == "__main__":
    serve(sys.argv[1])
