"""Copies what this process prints into ``train.log`` of the run directory, as plain text.

The launcher and rank 0 append to the same file, each whole lines with one write. Under torchrun and srun the other
ranks append their error lines.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import TextIOBase
from pathlib import Path
from typing import Any

from syncbn.training.atomic_write import unlinked
from syncbn.training.console import printable

NAME = "train.log"
ERROR = "error:"  # how error lines begin
LONG = 10_000  # characters from which on the replaced states of a line without an end are dropped
# Escape sequences of terminals: CSI (colours, cursor), OSC (titles, links), and those of two characters.
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_copies: "list[_Copied]" = []  # the streams of this process that are copied now


class TrainLog:
    """Appends lines to ``train.log``; keeps them until :meth:`begin`, since a refused command leaves no file behind.

    A line that cannot be written, on a full disk for example, is lost, and the run continues.

    Args:
        errors_only: keep error lines only.
    """

    def __init__(self, *, errors_only: bool = False) -> None:
        self._errors_only, self._waiting = errors_only, list[str]()
        self._file: int | None = None
        self._broken = False  # the last line was written in part

    def begin(self, run_dir: Path, heading: str = "") -> None:
        """Opens the file of this run directory, unless it is open, and writes ``heading`` and the lines so far."""
        if self._file is not None:
            return
        # O_NONBLOCK: a pipe without a reader is an error, and is not waited for.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        with suppress(OSError):
            self._file = os.open(unlinked(run_dir / NAME), flags, 0o666)
        lines, self._waiting = self._waiting, []
        for line in [heading, *lines] if heading else lines:
            self._write(line)

    def add(self, line: str) -> None:
        """Appends one line of text, which may have escape sequences of a terminal."""
        if self._errors_only and not line.startswith(ERROR):
            return
        if self._file is None:
            self._waiting.append(line)
        else:
            self._write(line)

    def close(self) -> None:
        """Closes the file. Lines without :meth:`begin` are dropped."""
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
        self._file, self._waiting = None, []

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        data = (plain(line) + "\n").encode("utf-8", "surrogateescape")
        with suppress(OSError):
            if self._broken:
                os.write(self._file, b"\n")
                self._broken = False
            written = os.write(self._file, data)
            self._broken = written < len(data)


def plain(line: str) -> str:
    """A line as a terminal shows it, without escape sequences: what a carriage return has replaced is left out."""
    parts = [part for part in ESCAPES.sub("", line).split("\r") if part.strip()]
    return printable(parts[-1].expandtabs()).rstrip() if parts else ""


def heading(attempt: int, command: str) -> str:
    """The first line of an attempt in the log."""
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    return printable(f"--- {now}, attempt {attempt}: {command}")


def append(run_dir: Path, *lines: str) -> None:
    """Appends lines to the log of a run that has begun, for a process whose output is not copied."""
    log = TrainLog()
    log.begin(run_dir)
    for line in lines:
        log.add(line)
    log.close()


@contextmanager
def copying(*, errors_only: bool = False) -> Iterator[TrainLog]:
    """Within this context, what this process prints through Python is copied to the log that it yields."""
    log, streams = TrainLog(errors_only=errors_only), (sys.stdout, sys.stderr)
    out, err = (_Copied(stream, log) for stream in streams)
    _copies[:], before = [out, err], list(_copies)
    handlers = _retarget(out, err)
    sys.stdout, sys.stderr = out, err
    try:
        yield log
    finally:
        sys.stdout, sys.stderr = streams
        _copies[:] = before
        for handler, stream in handlers:
            handler.setStream(stream)
        for each in (out, err):
            each.finish()
        log.close()


def note(line: str) -> None:
    """Appends a line to the log of this process that is not printed, such as the full form of a printed one."""
    if _copies:
        _copies[0].log.add(line)


def terminal() -> Any:
    """Standard output itself, which is not copied; for a display that is redrawn."""
    return sys.stdout.stream if isinstance(sys.stdout, _Copied) else sys.stdout


def divert(stream: TextIOBase | None) -> None:
    """Sends what is printed to ``stream``, such as above a progress bar, and to the log as before; None ends it.

    Processes that are forked meanwhile print as if nothing were diverted.
    """
    for each in _copies:
        each.diverted = stream, os.getpid()


class _Copied:
    """Standard output or standard error whose text also goes to the log."""

    def __init__(self, stream: Any, log: TrainLog) -> None:
        self.stream, self.log, self._line = stream, log, ""
        self.diverted: tuple[TextIOBase | None, int] = (None, 0)

    def write(self, text: str) -> int:
        to, pid = self.diverted
        written: int = (to if to is not None and pid == os.getpid() else self.stream).write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self.log.add(line)
        if len(self._line) > LONG:  # a progress bar such as tqdm's draws one line again for hours, without an end
            self._line = self._line[self._line.rstrip("\r").rfind("\r") + 1 :]
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def finish(self) -> None:
        """Copies a last line that has no end."""
        if self._line:
            self.log.add(self._line)
            self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _retarget(out: _Copied, err: _Copied) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Points log handlers for the standard streams to ``out`` and ``err``; returns what they had.

    Lightning's handler keeps the standard error of the time of its import.
    """
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    found = [handler for logger in loggers for handler in getattr(logger, "handlers", [])]
    changed = []
    for handler in found:
        target = {1: out, 2: err}.get(_descriptor(handler))
        if target is not None:
            changed.append((handler, handler.setStream(target)))
    return changed


def _descriptor(handler: logging.Handler) -> int:
    """The file descriptor that a handler writes to; 0 for another kind of handler."""
    with suppress(OSError, ValueError, AttributeError):
        return int(handler.stream.fileno())  # type: ignore[attr-defined]
    return 0
