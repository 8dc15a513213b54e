"""Short labels for combinations of settings: only the settings needed to distinguish them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from syncbn.training.errors import as_typed

Row = Mapping[str, Any]
# If several settings distinguish the same rows, the label contains the first of these.
PREFERRED = ("norm.name", "data.batch_size", "devices", "norm.batch_size", "norm.group", "data.shards")


def is_in(name: str, groups: Iterable[str]) -> bool:
    """Whether a setting is one of the groups, or in one of them."""
    return f"{name}.".startswith(tuple(f"{group}." for group in groups))


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings that are not the same in all rows, in alphabetical order."""
    names = sorted({name for row in rows for name in row})
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def distinguishing(rows: Sequence[Row], *, fewest: bool = True) -> list[str]:
    """A few settings that distinguish the rows as well as all settings do, familiar ones first (``PREFERRED``).

    With ``fewest``, a setting that became redundant after later ones were chosen is dropped.
    """
    chosen: list[str] = []
    for name in sorted(varying(rows), key=_preference):
        if _classes(rows, [*chosen, name]) > _classes(rows, chosen):
            chosen.append(name)
    for name in reversed(chosen) if fewest else ():  # a later setting can make an earlier one redundant
        rest = [each for each in chosen if each != name]
        if _classes(rows, rest) == _classes(rows, chosen):
            chosen = rest
    return chosen


def text(value: Any) -> str:
    """A value as the user types it on the command line."""
    return f"{value:g}" if isinstance(value, float) else as_typed(value)


def assignment(name: str, value: Any) -> str:
    """``optimizer.lr=0.1``; for a class its group and its name without the module, ``model=MLP``."""
    if name.endswith("._target_"):
        return f"{name.removesuffix('._target_')}={text(value).rpartition('.')[2]}"
    return f"{name}={text(value)}"


def at(conditions: Sequence[str]) -> str:
    """Labels of conditions, with a common setting named once: ``data.batch_size=2, 4``."""
    names = {condition.partition("=")[0] for condition in conditions}
    if len(names) == 1 and all(condition.count("=") == 1 for condition in conditions):
        return f"{names.pop()}={', '.join(condition.partition('=')[2] for condition in conditions)}"
    return ", ".join(filter(None, conditions))


def order(value: Any) -> tuple[int, float, str]:
    """A sort key: numbers by value, then strings."""
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, str(value))


def _preference(name: str) -> tuple[int, bool, str]:
    place = PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)
    return place, not name.endswith("._target_"), name


def _classes(rows: Sequence[Row], names: Sequence[str]) -> int:
    return len({tuple(row.get(name) for name in names) for row in rows})
