"""What a rank reports of the exception that ended it."""

import re
import traceback
from pathlib import Path
from typing import Any


def about(error: BaseException) -> dict[str, Any]:
    """What the launcher is told of an exception; short enough for a pipe (64 KiB) that nobody reads yet."""
    return {
        "kind": type(error).__name__,
        "message": _message(error)[:3000],
        "trace": "".join(traceback.format_exception(error))[-12000:],
        "place": _place(error),
        "guilty": bool(getattr(error, "guilty", False)),
    }


START = str(Path(__file__).with_name("rank_processes.py"))  # each rank begins in it; it is to blame for nothing
# torch 2.13: the message of an exception in a DataLoader's worker holds its traceback, after this line.
IN_WORKER = "\nOriginal Traceback (most recent call last):\n"


def _message(error: BaseException) -> str:
    """The message of an exception; of one in a worker of a DataLoader without the traceback that it contains."""
    head, found, trace = str(error).partition(IN_WORKER)
    if not found:
        return head
    lines = trace.rstrip().splitlines()
    inner = [number for number, line in enumerate(lines) if line.startswith("    ")]  # the code that raised it is last
    said = " ".join(lines[inner[-1] + 1 :] if inner else lines[-1:])
    return f"{said.partition(': ')[2] or said} ({head.partition(' in ')[2].rstrip('.')})"


def _place(error: BaseException) -> str:
    """Where it was raised: the innermost line that is not of an installed package."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    frames += re.findall(r'^  File "(.*)", line (\d+)', str(error).partition(IN_WORKER)[2], re.MULTILINE)
    own = [frame for frame in frames if "site-packages" not in frame[0] and frame[0] != START]
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""
