"""A process that runs a program again and again, ``train.py`` mostly, as asked on standard input: a JSON line a call.

It has imported what a run needs, and each call is a fork of it, which leads a session of its own; what Python's
multiprocessing starts in a call, the server that ranks are forked from among it, is a fork of that. So a call is spared
five seconds of imports, and is as one from a shell in all else: it can be killed, and leaves behind what it would.
"""

import atexit
import gc
import json
import os
import runpy
import sys
import tempfile
import threading
import traceback
import warnings
from contextlib import suppress
from multiprocessing import util
from pathlib import Path

import wandb.sdk.launch  # noqa: F401

import syncbn.training.data.digits  # noqa: F401  # it imports scikit-learn, which takes a second
import syncbn.training.launch.job  # noqa: F401
import syncbn.training.launch.rank  # noqa: F401


def call(program: str, arguments: list[str], where: str, environment: dict[str, str], files: tuple[str, str]) -> None:
    """Ends this process as the interpreter would, but takes nothing apart that is imported: that takes a second."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    opened = {path: os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND) for path in dict.fromkeys(files)}
    for descriptor, path in enumerate(files, start=1):
        os.dup2(opened[path], descriptor)
    close_all_but(0, 1, 2)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as TMPDIR says
    os.chdir(where)
    warnings.resetwarnings()
    util.spawnv_passfds = forked
    sys.argv = [program, *arguments]
    code = 1
    try:
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def forked(path: str, arguments: list[str], descriptors: list[int]) -> int:
    """For ``multiprocessing.util.spawnv_passfds``: runs ``python -c CODE`` in a fork of this process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            close_all_but(0, 1, 2, *descriptors)
            exec(arguments[-1], {"__name__": "__main__"})
            code = 0
        finally:
            os._exit(code)
    return pid


def close_all_but(*descriptors: int) -> None:
    for each in {int(path.name) for path in Path("/dev/fd").iterdir()} - set(descriptors):
        with suppress(OSError):  # that of the listing itself
            os.close(each)


if __name__ == "__main__":
    answers = int(sys.argv[1])
    gc.freeze()
    requests = b""
    while chunk := os.read(0, 65536):
        requests += chunk
        while b"\n" in requests:
            request, _, requests = requests.partition(b"\n")
            pid = os.fork()
            if pid == 0:
                call(**json.loads(request))
            os.write(answers, b"%d\n" % pid)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(answers, b"%d\n" % code)
