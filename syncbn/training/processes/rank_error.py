"""Describes the exception that ended a rank, in a form that fits through a pipe to the launcher."""

import re
import traceback
from pathlib import Path
from typing import Any


def describe(error: BaseException) -> dict[str, Any]:
    """Class, message, traceback and place of an exception.

    The texts are cut so that they fit into the buffer of a pipe (64 KiB): a rank must not block while the launcher does
    not read.
    """
    return {
        "kind": type(error).__name__,
        "message": _message(error)[:3000],
        "trace": "".join(traceback.format_exception(error))[-12000:],
        "place": _place(error),
        "guilty": bool(getattr(error, "guilty", False)),
    }


# The outermost frames of each rank, which are never the place of an error.
START = str(Path(__file__).with_name("rank_processes.py"))
# torch 2.13: the message of an exception in a DataLoader worker contains its traceback, after this line.
IN_WORKER = "\nOriginal Traceback (most recent call last):\n"


def _message(error: BaseException) -> str:
    """The message of an exception, without the traceback that torch adds to one from a DataLoader worker."""
    head, found, trace = str(error).partition(IN_WORKER)
    if not found:
        return head
    lines = trace.rstrip().splitlines()
    # Indices of the source lines; the message follows the last of them.
    inner = [number for number, line in enumerate(lines) if line.startswith("    ")]
    text = " ".join(lines[inner[-1] + 1 :] if inner else lines[-1:])
    return f"{text.partition(': ')[2] or text} ({head.partition(' in ')[2].rstrip('.')})"


def _place(error: BaseException) -> str:
    """File and line that raised the exception: the innermost frame outside installed packages; "" without one."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'^  File "(.*)", line (\d+)', str(error).partition(IN_WORKER)[2], re.MULTILINE)
    own = [frame for frame in frames if "site-packages" not in frame[0] and frame[0] != START]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""
