"""Reads small files that may be damaged, or that another user wrote."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from syncbn.training.errors import SettingError

DEPTH = 50  # objects within objects in a file of a run; settings have fewer than 10
VALUES = 100_000  # in one such file; a run with each corruption at each severity has some hundred


class DamagedError(SettingError):
    """A file is there, and its contents are not what was written.

    Printed as a sentence, without a colon: ``outputs/a/run.json is damaged (empty)``.

    Args:
        file: its path.
        hint: what is wrong with it, ``"is damaged (empty)"``.
    """

    def __init__(self, file: str | Path, hint: str) -> None:
        super().__init__(str(file), hint=hint)
        self.args = (f"{file} {hint}",)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, whose numbers and depth are such that the rest of the program can compute with it.

    Raises:
        DamagedError: it holds something else; the error says what, with the path as it was given.
        OSError: it cannot be read.
    """
    text = read_text(path)
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"is damaged (not JSON: {error})") from None
    if not isinstance(contents, dict):
        raise DamagedError(path, f"is damaged (it holds a {type(contents).__name__}, and should hold an object)")
    if wrong := out_of_range(contents):
        raise DamagedError(path, f"is damaged ({wrong})")
    return contents


def out_of_range(contents: Any) -> str:
    """What in JSON or YAML no file of a run has: numbers of more than 64 bits, too many values, or too much depth.

    YAML's aliases make much of little: one to itself is endless, and ten levels of ten are ten thousand million values.
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
    """The text of a file that is not empty.

    Raises:
        DamagedError: it is empty, or is not text.
        OSError: it cannot be read.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise DamagedError(path, "is damaged (not text in UTF-8)") from None
    if not text.strip("\0 \t\r\n"):
        raise DamagedError(path, "is damaged (empty)")
    return text


def read_bytes(path: Path) -> bytes:
    """The contents of a file. What is no file, such as a named pipe, is not waited for.

    Raises:
        DamagedError: it is a pipe, a socket or a device.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # a pipe would wait
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DamagedError(path, "is damaged (it is no regular file)")
        return file.read()
