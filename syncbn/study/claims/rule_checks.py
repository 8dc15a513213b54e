"""Of a claim's settings: each is what it should be, or there is one line that says what would do."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from syncbn.training.errors import SettingError


def section(place: str, given: Any, keys: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    """All keys, None where one that may be left out is."""
    if not isinstance(given, Mapping):
        raise SettingError(f"{place}={given}: use a section with {', '.join(keys)}")
    if unknown := [str(key) for key in given if key not in keys]:
        raise SettingError(f"{place}.{unknown[0]}: there is no such key; use {', '.join(keys)}")
    if missing := [key for key in keys if given.get(key) is None and key not in optional]:
        raise SettingError(f"{place}.{missing[0]}: it is missing")
    return {key: given.get(key) for key in keys}


def names(place: str, given: Any) -> tuple[str, ...]:
    """A list of words, one at least."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise SettingError(f"{place}={given}: use a list of names")
    return tuple(map(str, given))


def chosen(place: str, given: Any, there: Sequence[str]) -> tuple[str, ...]:
    """Those of ``there`` that are named, all where none is."""
    if given is None:
        return tuple(there)
    return tuple(one_of(place, each, there) for each in names(place, given))


def one_of(place: str, given: str, there: Iterable[str]) -> str:
    """A word that is there."""
    if given not in there:
        raise SettingError(f"{place}={given}: use {one_of_these(there)}")
    return given


def one_of_these(names: Iterable[str]) -> str:
    """``one of mean, worst``."""
    return f"one of {', '.join(names)}"


def number(place: str, given: Any) -> float:
    """Neither text nor infinite."""
    if not isinstance(given, int | float) or isinstance(given, bool) or not math.isfinite(given):
        raise SettingError(f"{place}={given}: use a number")
    return float(given)


def is_number(word: str) -> bool:
    """Whether a word can be read as one that is finite."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def truth(place: str, given: Any) -> bool:
    """True or false, which is what is left out."""
    if not isinstance(given, bool | None):
        raise SettingError(f"{place}={given}: use true or false")
    return bool(given)
