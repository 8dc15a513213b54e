"""The code blocks of a page in Markdown: files to write, commands to type, and what the commands print.

A block of Python or YAML that begins with a comment with a path is a file; Hydra wants its ``# @package`` before it. In
a block of ``console`` a line that begins with ``$`` is a command, a backslash at its end continues it, and the lines
below it are what it prints. A line ``...`` stands for lines that are left out.
"""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"(?:# @package \w+\n)?# ([\w./-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class File:
    """A file that the reader writes."""

    path: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command that the reader types, and the lines that it prints."""

    words: list[str]
    printed: list[str] = field(default_factory=list)


def steps(page: Path) -> list[File | Command]:
    """The files and commands of a page, in its order."""
    found: list[File | Command] = []
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        path = PATH.match(text)
        if language == "console":
            found += _commands(text)
        elif path is not None:
            found.append(File(path[1], text))
    return found


def _commands(text: str) -> list[Command]:
    found: list[Command] = []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            found.append(Command(shlex.split(line[2:], comments=True)))
        elif line.strip() not in ("", "..."):
            found[-1].printed.append(line)
    return found


def shape(line: str) -> str:
    """The first three words of a line, with ``#`` for each number; indentation does not count."""
    line = re.sub(r"\d{8}-\d{6}-[0-9a-f]{4}", "RUN", line)
    words = re.sub(r"[\d,.]*\d", "#", line).split()
    return " ".join(words[:3])
