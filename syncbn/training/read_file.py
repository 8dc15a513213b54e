"""Reads small text and JSON files, and reports damaged ones; the files may come from other users."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from syncbn.training.errors import SettingError

DEPTH = 50  # largest nesting of objects in a file of a run; settings are nested less than 10 deep
VALUES = 100_000  # most values in such a file; a run with all corruptions at all severities has some hundreds


class DamagedError(SettingError):
    """A file exists, but its contents are damaged.

    Printed as a sentence, without a colon: ``outputs/a/run.json is damaged (empty)``.

    Args:
        file: its path.
        hint: what is wrong with it, ``"is damaged (empty)"``.
    """

    def __init__(self, file: str | Path, hint: str) -> None:
        super().__init__(str(file), hint=hint)
        self.args = (f"{file} {hint}",)


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file, and limits its numbers, size and depth to what the program can process.

    Raises:
        DamagedError: the file holds something else; the error names the path as it was given, and the problem.
        OSError: the file cannot be read.
    """
    text = read_text(path)
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"is damaged (not JSON: {error})") from None
    if not isinstance(contents, dict):
        raise DamagedError(path, f"is damaged (it holds a {type(contents).__name__}, and should hold an object)")
    if _may_exceed(text) and (wrong := out_of_range(contents)):
        raise DamagedError(path, f"is damaged ({wrong})")
    return contents


def _may_exceed(text: str) -> bool:
    """Whether JSON may exceed a limit of :func:`out_of_range`, which takes as long as parsing it."""
    is_small = len(text) < VALUES and text.count("{") + text.count("[") < DEPTH
    return not is_small or re.search(r"\d{19}", text) is not None


def out_of_range(contents: Any) -> str:
    """The first limit that a JSON or YAML value exceeds: numbers of 64 bits, number of values, depth; "" if none.

    A short YAML file can expand to a huge value by aliases. An alias to itself has no end, and ten levels of ten
    aliases are ten thousand million values.
    """
    left, seen = [(contents, 0)], 0
    while left:
        value, depth = left.pop()
        seen += 1
        if depth > DEPTH:
            return f"its objects are nested more than {DEPTH} deep"
        if seen > VALUES:
            return f"it has more than {VALUES} values"
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return "it has a number of more than 64 bits"
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left += [(each, depth + 1) for each in parts]
    return ""


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8.

    Raises:
        DamagedError: the file is empty, or is not text.
        OSError: the file cannot be read.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise DamagedError(path, "is damaged (not text in UTF-8)") from None
    if not text.strip("\0 \t\r\n"):
        raise DamagedError(path, "is damaged (empty)")
    return text


def read_bytes(path: Path) -> bytes:
    """Reads a regular file. It does not wait for the writer of a named pipe.

    Raises:
        DamagedError: the path is of a pipe, a socket or a device.
        OSError: the file cannot be read.
    """
    # Without O_NONBLOCK the opening of a named pipe waits for a writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DamagedError(path, "is damaged (it is no regular file)")
        return file.read()
