"""Makes standard output and standard error take any text, so that a name with accents cannot end a run."""

import codecs
import logging
import sys
from io import TextIOWrapper

ERRORS = "syncbn.escape"


def accept_any_text() -> None:
    """Escapes characters that the terminal's encoding lacks, where Python would raise UnicodeEncodeError.

    Bytes of a file name that are not in the locale's encoding (PEP 383) are written as they are.
    """
    if sys.getfilesystemencoding() != "utf-8":  # the log files of libraries may lack characters too
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
    """The byte that this character represents; empty if it represents none."""
    return bytes([ord(character) - 0xDC00]) if "\udc80" <= character <= "\udcff" else b""
