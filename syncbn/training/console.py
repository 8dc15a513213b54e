"""Prints for people. Every line that this program prints comes through here, so that none does more than to be read.

Names of runs, settings, file names and messages of exceptions may hold escape sequences, which move the cursor or
change what stands above, line breaks, which make a second line, and marks that turn the direction of a line.
"""

import re
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

SURROGATES = re.compile("([\udc80-\udcff]+)")


def printable(text: object) -> str:
    """``text`` as one line: what is not a letter, sign or space becomes an escape, such as ``\\x1b`` or ``\\n``.

    Letters of a file name that the locale lacks come as surrogates (PEP 383), and stay.
    """
    return "".join(
        part if _is_text(part) else "".join(map(_escaped, part)) for part in SURROGATES.split(str(text)) if part
    )


def _escaped(character: str) -> str:
    harmless = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if harmless else character.encode("unicode_escape").decode("ascii")


def _is_text(part: str) -> bool:
    """Whether these are surrogates that represent printable characters in UTF-8."""
    if not SURROGATES.fullmatch(part):
        return False
    return part.encode("ascii", "surrogateescape").decode("utf-8", "replace").replace("\ufffd", "\0").isprintable()


def print_line(text: object = "", *, error: bool = False) -> None:
    """Prints one line at once.

    Args:
        text: printed as :func:`printable` makes it.
        error: to standard error.
    """
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def cell(text: object, style: str = "") -> "Text":
    """One line for a table or console of rich, whose markup in it is not obeyed."""
    from rich.text import Text  # a tenth of a second, which a mistyped setting should not cost

    return Text(printable(text), style)
