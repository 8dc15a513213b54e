"""Assigns each run to a side and a condition by its settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncbn.study.compare.runs import labels
from syncbn.study.compare.runs.run_reader import Run
from syncbn.study.compare.runs.settings import implied, settings
from syncbn.training.errors import SettingError

Row = dict[str, Any]
# The default order of norms; other names follow in alphabetical order.
NORMS = ("local", "local_mean", "shuffle", "ghost", "sync", "torch_sync", "group_norm", "none")
# Settings that follow from another setting. If the latter is the factor, they belong to the factor too.
BRINGS = {
    "norm.batch_size": ("norm.group", "norm.ghost_batch"),
    "trainer.devices": ("devices",),
    "simulate": ("devices",),
}


@dataclass(frozen=True)
class Layout:
    """Sides and conditions of a list of runs.

    Attributes:
        factor: names of settings, or of groups of settings.
        baseline: the side with which the others are compared.
        sides: labels of the sides, the baseline first.
        conditions: labels of the conditions, in order.
        axis: the only setting that varies between conditions, if it is numeric; else "".
        side_of: the side's label for each run, in the order of the runs; "" if the settings are unreadable.
        condition_of: the condition's label for each run, likewise.
        side_rows: the factor's settings, by side.
        condition_rows: all other settings except the seed, by condition.
        named: the settings in the conditions' labels.
    """

    factor: tuple[str, ...]
    baseline: str
    sides: list[str]
    conditions: list[str]
    axis: str
    side_of: list[str]
    condition_of: list[str]
    side_rows: dict[str, Row]
    condition_rows: dict[str, Row]
    named: list[str]


def lay_out(runs: Sequence[Run], factor: str, baseline: str | None) -> Layout:
    """Sorts runs into sides and conditions.

    Args:
        runs: of any status.
        factor, baseline: as in :func:`syncbn.study.compare.compare.compare`.

    Raises:
        SettingError: no run has the factor, all runs have the same value of it, or the baseline does not exist.
    """
    names = tuple(each for name in factor.split(",") for each in (name.strip(), *BRINGS.get(name.strip(), ())) if each)
    rows = [settings(run) for run in runs]
    known = [row for row in rows if row]
    left_out = implied(names, known)
    for row in known:
        row.pop(left_out, None)
    side_rows = [_part(row, names, inside=True) for row in rows]
    rests = [_part(row, names, inside=False) for row in rows]
    distinct = _distinct([part for part, row in zip(side_rows, rows, strict=True) if row])
    if not any(distinct):
        there = ", ".join(sorted({name.split(".")[0] for row in known for name in row}))
        hint = f"use one of {there}, or a setting inside one" if there else "no settings of these runs can be read"
        raise SettingError("--factor", factor, f"the runs have no such setting; {hint}")
    if len(distinct) == 1:
        _refuse_one_side(factor, names, distinct[0], known)
    side_names = {_key(part): label for part, label in zip(distinct, _side_labels(distinct, names), strict=True)}
    side_of = [side_names[_key(part)] if row else "" for part, row in zip(side_rows, rows, strict=True)]
    by_side = {side_names[_key(part)]: part for part in distinct}
    sides = sorted(by_side, key=lambda label: _rank(label, by_side[label]))
    if baseline is not None and baseline not in sides:
        raise SettingError("--baseline", baseline, f"there is no such side; use one of {', '.join(map(repr, sides))}")
    first = baseline or ("local" if "local" in sides else sides[0])
    sides = [first, *(side for side in sides if side != first)]
    distinct = _distinct([rest for rest, row in zip(rests, rows, strict=True) if row])
    named = labels.distinguishing(distinct)
    condition_names = _condition_labels(distinct, named)
    condition_of = [condition_names[_key(rest)] if row else "" for rest, row in zip(rests, rows, strict=True)]
    by_condition = {condition_names[_key(rest)]: rest for rest in distinct}
    conditions = sorted(by_condition, key=lambda label: [labels.order(by_condition[label].get(name)) for name in named])
    numbers = [row.get(name) for row in distinct for name in named]
    is_axis = len(named) == 1 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    axis = named[0] if is_axis else ""
    return Layout(names, first, sides, conditions, axis, side_of, condition_of, by_side, by_condition, named)


def _part(row: Row, names: Sequence[str], *, inside: bool) -> Row:
    """The settings of the factor if ``inside``, else the other settings."""
    return {name: value for name, value in row.items() if labels.is_in(name, names) == inside}


def _side_labels(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Labels of sides, such as ``local``, ``sync group=2`` or ``32``. Settings are added where a name is ambiguous."""
    chief = next((f"{name}{end}" for name in names for end in (".name", "._target_") if f"{name}{end}" in rows[0]), "")
    if not chief:
        chosen = labels.distinguishing(rows)
        if len(chosen) == 1:
            return [labels.text(row.get(chosen[0])) for row in rows]
        return [" ".join(labels.assignment(name, row.get(name)) for name in chosen) for row in rows]
    made = []
    for row in rows:
        alike = [other for other in rows if other.get(chief) == row.get(chief)]
        chosen = [name for name in labels.distinguishing(alike, fewest=False) if name in row]
        more = [labels.assignment(_within(name, names), row[name]) for name in chosen]
        made.append(" ".join([labels.text(row.get(chief)).rpartition(".")[2], *more]))
    return made if len({*made}) == len(made) else [f"{label} ({number})" for number, label in enumerate(made, 1)]


def _within(name: str, factor: Sequence[str]) -> str:
    """The name relative to the factor: ``group`` for ``norm.group`` if ``norm`` is the factor."""
    return next((name.removeprefix(f"{each}.") for each in factor if name.startswith(f"{each}.")), name)


def _condition_labels(rows: Sequence[Row], named: Sequence[str]) -> dict[tuple[Any, ...], str]:
    made = {_key(row): " ".join(labels.assignment(name, row.get(name)) for name in named) for row in rows}
    if len({*made.values()}) < len(made):  # for example a number and its string, or two classes of one name
        return {key: f"{label} ({number})" for number, (key, label) in enumerate(made.items(), 1)}
    return made


def _rank(label: str, row: Row) -> tuple[int, list[tuple[int, float, str]], str]:
    name = row.get("norm.name")
    return NORMS.index(name) if name in NORMS else len(NORMS), [labels.order(v) for _, v in sorted(row.items())], label


def _refuse_one_side(factor: str, names: Sequence[str], row: Row, rows: Sequence[Row]) -> None:
    others = [name for name in labels.varying(rows) if not labels.is_in(name, names)]
    other = f", or --factor={others[0]}, in which they differ" if others else ""
    (label,) = _side_labels([row], names)
    raise SettingError(
        "--factor",
        factor,
        f"all runs have {label or labels.assignment(*next(iter(row.items())))}; give runs with another {factor} "
        f"too{other}",
    )


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The distinct rows, in an order independent of the input order."""
    found = {_key(row): row for row in rows}
    return [found[key] for key in sorted(found, key=lambda key: [(name, labels.order(value)) for name, value in key])]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted(row.items(), key=lambda item: item[0]))
