"""Prints for people. Every line that this program prints comes through here, so that none does more than to be read.

Names of runs, settings, file names and messages of exceptions may hold escape sequences, which move the cursor or
change what stands above, line breaks, which make a second line, and marks that turn the direction of a line.
"""

import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


def printable(text: object) -> str:
    """``text`` as one line: what is not a letter, sign or space becomes an escape, such as ``\\x1b`` or ``\\n``."""
    return "".join(
        each
        if each.isprintable() or unicodedata.category(each) == "Zs"
        else each.encode("unicode_escape").decode("ascii")
        for each in str(text)
    )


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
