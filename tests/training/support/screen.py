"""A small terminal: what is on the screen, with all that has scrolled off it, after a program has written to it."""

import re

TOKEN = re.compile(r"\x1b\[\??([0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n])")


def lines(text: str, width: int = 80) -> list[str]:
    """The lines on a terminal of this width, without trailing spaces and empty lines at the end.

    It knows what rich writes: colours, which are left out, cursor up, and the deletion of a line.
    """
    rows, row, column = [""], 0, 0
    for match in TOKEN.finditer(text):
        number, code, move, letter = match.groups()
        if code == "A":
            row = max(row - int(number or 1), 0)
        elif code == "K":
            assert number == "2", text
            rows[row] = ""
        elif code not in (None, "m", "h", "l"):
            raise AssertionError(f"{match.group()!r} is not known")
        elif move == "\r":
            column = 0
        elif move == "\n" or (letter and column == width):
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        if letter:
            rows[row] = f"{rows[row]:<{column}}"[:column] + letter + rows[row][column + 1 :]
            column += 1
    shown = [line.rstrip() for line in rows]
    while shown and not shown[-1]:
        shown.pop()
    return shown
