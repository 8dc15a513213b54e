"""Short names for combinations of settings: what varies, and no more of it than tells them apart."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
# Of settings that tell the same rows apart, the first of these is named.
PREFERRED = ("norm.name", "data.batch_size", "devices", "norm.batch_size", "norm.group", "data.shards")


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings that are not the same in all rows, in alphabetical order."""
    names = sorted({name for row in rows for name in row})
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def distinguishing(rows: Sequence[Row], *, fewest: bool = True) -> list[str]:
    """A few settings that tell all rows apart that any can tell apart, those people look at first preferred.

    Args:
        rows: combinations of settings.
        fewest: whether one is left out that those after it make superfluous.
    """
    chosen: list[str] = []
    for name in sorted(varying(rows), key=_preference):
        if _classes(rows, [*chosen, name]) > _classes(rows, chosen):
            chosen.append(name)
    for name in reversed(chosen) if fewest else ():  # an earlier one may be no help any more
        rest = [each for each in chosen if each != name]
        if _classes(rows, rest) == _classes(rows, chosen):
            chosen = rest
    return chosen


def along(rows: Sequence[Row], chosen: Sequence[str]) -> list[str]:
    """The other settings that vary: each goes with those that were chosen."""
    return [name for name in varying(rows) if name not in chosen]


def text(value: Any) -> str:
    """A value for people, as one would give it on the command line; a class without its module."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def assignment(name: str, value: Any) -> str:
    """``optimizer.lr=0.1``; a class by its group alone, ``model=MLP``."""
    if name.endswith("._target_"):
        return f"{name.removesuffix('._target_')}={text(value).rpartition('.')[2]}"
    return f"{name}={text(value)}"


def order(value: Any) -> tuple[int, float, str]:
    """Sorts numbers as numbers, and before words."""
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value))


def _preference(name: str) -> tuple[int, bool, str]:
    place = PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)
    return place, not name.endswith("._target_"), name


def _classes(rows: Sequence[Row], names: Sequence[str]) -> int:
    return len({tuple(row.get(name) for name in names) for row in rows})
