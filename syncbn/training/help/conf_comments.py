"""Reads the settings of a file in ``conf/``, with the comments that explain them.

The comment of a setting stands in its line, in the lines below at the same column, or in the lines above it. The
comment at the top of a file is about the file. A YAML parser drops comments, so the lines are read here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

GLOBAL = "@package _global_"
LINE = re.compile(r"(?P<indent> *)(?P<key>[\w./-]+):(?: +(?P<value>.*))?")
DEFAULT = re.compile(r" *- +(?P<override>override +)?/?(?P<group>[\w/.@]+)(?:: +(?P<choice>.*))?")


class Setting(NamedTuple):
    """A setting of a file.

    Attributes:
        name: with the names of the sections that it is in, such as ``resume.keep``.
        value: as it is written; None for the head of a section.
        comment: what it is for; empty if the file does not explain it.
    """

    name: str
    value: str | None
    comment: str


class Default(NamedTuple):
    """An entry of the defaults list: a group and its choice (None: no choice), or another file of the same group."""

    group: str
    choice: str | None
    comment: str
    overrides: bool


@dataclass
class ConfFile:
    """A file of settings.

    Attributes:
        about: the comment at the top.
        is_global: its settings have their full names, because they belong to several groups.
    """

    about: str = ""
    is_global: bool = False
    defaults: list[Default] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The first sentence of the comment at the top."""
        return re.split(r"(?<=[.?]) (?=[A-Z`])", self.about, maxsplit=1)[0].rstrip(".")


def read(path: Path) -> ConfFile:
    """Reads a file; bytes that are not UTF-8 are replaced."""
    found, sections, above, column, started = ConfFile(), list[tuple[int, str]](), list[str](), -1, False
    head: list[str] = []  # without commands, which are indented
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        code, comment, at = _split(line)
        if not code.strip():
            if not comment and not line.strip():
                above, column = [], -1
            elif started and at == column:
                _extend(found, comment)
            elif started:
                above.append(comment)
            elif comment == GLOBAL:
                found.is_global = True
            elif not line.startswith("#  "):
                head.append(comment)
            continue
        started, column = True, at
        if (default := DEFAULT.fullmatch(code)) and [name for _, name in sections] == ["defaults"]:
            choice = _text(default["choice"])
            found.defaults.append(Default(default["group"], choice, comment, default["override"] is not None))
        elif match := LINE.fullmatch(code):
            indent = len(match["indent"])
            sections = [(depth, name) for depth, name in sections if depth < indent]
            sections.append((indent, match["key"]))
            name = ".".join(each for _, each in sections)
            if name != "defaults":
                found.settings.append(Setting(name, match["value"], comment or " ".join(above)))
        above = []
    found.about = " ".join(head)
    return found


def _extend(found: ConfFile, comment: str) -> None:
    """Adds a line to the comment of the last setting, or of the last entry of the defaults list."""
    if found.settings:
        last = found.settings[-1]
        found.settings[-1] = last._replace(comment=f"{last.comment} {comment}".strip())
    elif found.defaults:
        found.defaults[-1] = found.defaults[-1]._replace(comment=f"{found.defaults[-1].comment} {comment}".strip())


def _split(line: str) -> tuple[str, str, int]:
    """Splits a line into YAML, its comment, and the column of the comment; -1 without one."""
    quote = ""
    for at, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter if not line[:at].strip() or line[at - 1] in " [{,:" else ""
        elif letter == "#" and (at == 0 or line[at - 1] == " "):
            return line[:at].rstrip(), line[at + 1 :].strip(), at
    return line.rstrip(), "", -1


def _text(value: str | None) -> str | None:
    """The choice of a defaults list; ``${oc.env:NAME,CHOICE}`` is CHOICE."""
    if value is None or value == "null":
        return None
    environment = re.fullmatch(r"\$\{oc\.env:\w+, *(.*)\}", value)
    return environment[1] if environment else value


def files(directories: list[Path], group: str) -> Iterator[tuple[str, Path]]:
    """The choices of a group by name, with their files. A file of an earlier directory hides one of a later."""
    found: dict[str, Path] = {}
    for directory in reversed(directories):
        for path in (directory / group).glob("*.yaml"):
            found[path.stem] = path
    yield from sorted(found.items())
