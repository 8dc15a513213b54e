"""Filters and sorts the list."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from syncbn.runs.find import natural
from syncbn.runs.names import ABSENT, Names, Value, text, value
from syncbn.runs.read import Run
from syncbn.training.errors import SettingError, as_typed

CONDITION = re.compile(r"(?P<name>[^=<>!]+?)\s*(?P<operator>!=|>=|<=|=|>|<)\s*(?P<wanted>.*)", re.DOTALL)
COMPARES = {
    ">": lambda one, other: one > other,
    ">=": lambda one, other: one >= other,
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
}


class Filter(NamedTuple):
    """A condition such as ``status=failed``, ``norm.name!=sync`` or ``test/acc>0.9``."""

    name: str
    operator: str
    wanted: str

    def admits(self, run: Run) -> bool:
        """Whether a run meets the condition. One that lacks the value meets ``!=``, and ``=null``."""
        found = value(run, self.name)
        if self.operator in ("=", "!="):
            return self._equals(found) == (self.operator == "=")
        if found is ABSENT or found is None or found == "":
            return False
        return bool(COMPARES[self.operator](*_comparable(found, self.wanted)))

    def _equals(self, found: Value) -> bool:
        if found is ABSENT:
            return self.wanted == "null"
        number = _number(self.wanted)
        if number is not None and isinstance(found, int | float) and not isinstance(found, bool):
            return float(found) == number
        written = {as_typed(found), text(found), text(found, self.name)}
        return any(fnmatchcase(each, self.wanted) or each == self.wanted for each in written)


def parse(option: str, names: Names) -> Filter:
    """A condition as it was typed.

    Raises:
        SettingError: it has no operator, or names what no run has.
    """
    match = CONDITION.fullmatch(option.strip())
    if match is None:
        hint = "use name=value, or one of !=, >, >=, <, <= in quotes: 'test/acc>0.9'"
        raise SettingError("--filter", option, hint)
    name = names.find("--filter", match["name"], option)
    if match["operator"] in COMPARES and name in names.numbers and _number(match["wanted"]) is None:
        raise SettingError("--filter", option, f"{name} is a number; compare it with one, such as {name}>0.5")
    return Filter(name, match["operator"], match["wanted"])


def ordered(runs: Sequence[Run], name: str) -> list[Run]:
    """The runs by a field, setting or metric: numbers by value, then text. Runs that lack it come last."""
    return sorted(runs, key=lambda run: _key(value(run, name)))


def _key(found: Value) -> tuple[int, float, list[tuple[str, int]]]:
    if found is ABSENT or found is None or found == "" or found != found:
        return (2, 0.0, [])
    if isinstance(found, int | float):
        return (0, float(found), [])
    return (1, 0.0, natural(text(found)))


def _comparable(found: Value, wanted: str) -> tuple[Value, Value]:
    number = _number(wanted)
    if number is not None and isinstance(found, int | float):
        return float(found), number
    return as_typed(found), wanted  # times: 2026-01-31 comes before 2026-02-01


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
