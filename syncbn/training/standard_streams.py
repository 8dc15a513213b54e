"""Makes standard output and standard error accept any text, and survive when their reader is gone.

``python train.py | head`` ends the reader of a pipe, and a dropped connection ends a terminal. Python then raises an
error at the next print. It also raises for letters that the terminal's encoding lacks. Neither may end a run.
"""

import codecs
import errno
import io
import logging
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

ERRORS = "syncbn.escape"
GONE = (errno.EPIPE, errno.EIO)  # the pipe has no reader, or the terminal is gone


def accept_any_text() -> None:
    """Escapes characters that the terminal's encoding lacks, for which Python would raise UnicodeEncodeError.

    Bytes of a file name that are not in the locale's encoding (PEP 383) are written unchanged.
    """
    if sys.getfilesystemencoding() != "utf-8":  # the log files of libraries have the same encoding
        logging.raiseExceptions = False
    codecs.register_error(ERRORS, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a notebook or a test may have put another object there
            stream.reconfigure(errors=ERRORS)


def _escaped(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return b"".join(_byte(each) or each.encode("ascii", "backslashreplace") for each in text), error.end


def _byte(character: str) -> bytes:
    """The byte that a surrogate represents (PEP 383); empty for other characters."""
    return bytes([ord(character) - 0xDC00]) if "\udc80" <= character <= "\udcff" else b""


class _Stream(io.FileIO):
    """A raw stream that drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in GONE:
                _to_null(self.fileno())
            return memoryview(data).nbytes  # the stream stays open: a full disk may have room again for the next line


def outlive_reader() -> None:
    """Replaces ``sys.stdout`` and ``sys.stderr`` with streams whose ``write`` never raises an OSError.

    A closed standard stream (``>&-``) is replaced with the null device, so that no other file gets its descriptor.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or _is_plain(stream, descriptor):
            setattr(sys, name, _lasting(stream, descriptor, name))
            setattr(sys, f"__{name}__", getattr(sys, name))


def _is_plain(stream: Any, descriptor: int) -> bool:
    """Whether this is Python's own stream of the descriptor; a test runner's stream is not replaced."""
    with suppress(OSError, ValueError, AttributeError):
        return bool(stream.fileno() == descriptor) and not isinstance(stream.buffer, _Stream | _Buffer)
    return False


class _Buffer(io.BufferedWriter):
    """A subclass that marks a stream that has been replaced."""


def _lasting(stream: Any, descriptor: int, name: str) -> io.TextIOWrapper:
    raw = _Stream(descriptor, "wb", closefd=False)
    raw.name = f"<{name}>"  # as Python names its own
    unbuffered = stream is not None and isinstance(stream.buffer, io.RawIOBase)  # python -u
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        raw if unbuffered else _Buffer(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors=getattr(stream, "errors", "backslashreplace"),
        line_buffering=name == "stderr" or raw.isatty(),
        write_through=unbuffered,
    )


def _to_null(descriptor: int) -> None:
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
