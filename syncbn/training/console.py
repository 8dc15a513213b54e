"""Prints lines with control characters escaped. All output of this program goes through this module.

Names of runs, settings, file names and messages of exceptions may contain escape sequences, which move the cursor or
change earlier output, line breaks, and marks that reverse the direction of a line.
"""

import re
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

SURROGATES = re.compile("([\udc80-\udcff]+)")


def printable(text: object) -> str:
    """``text`` as one line, with all characters that are not printable escaped, such as ``\\x1b`` and ``\\n``.

    Letters of a file name that the locale lacks are surrogates (PEP 383). They are kept.
    """
    text = str(text)
    if text.isprintable():  # nearly every line
        return text
    return "".join(part if _is_text(part) else "".join(map(_escaped, part)) for part in SURROGATES.split(text) if part)


def _escaped(character: str) -> str:
    harmless = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if harmless else character.encode("unicode_escape").decode("ascii")


def _is_text(part: str) -> bool:
    """Whether these are surrogates that represent printable characters in UTF-8."""
    if not SURROGATES.fullmatch(part):
        return False
    return part.encode("ascii", "surrogateescape").decode("utf-8", "replace").replace("\ufffd", "\0").isprintable()


def print_line(text: object = "", *, error: bool = False) -> None:
    """Prints one line and flushes it.

    Args:
        text: escaped by :func:`printable`.
        error: print to standard error.
    """
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def cell(text: object, style: str = "") -> "Text":
    """One line for a table or console of rich, without interpreting rich's markup in it."""
    from rich.text import Text  # the import takes a tenth of a second, which a mistyped setting should not cost

    return Text(printable(text), style)
