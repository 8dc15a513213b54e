"""The plots that a claim asks for, checked against the study's parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from syncbn.study.claims import rule_checks
from syncbn.training.errors import SettingError

KEYS = ["kind", "part", "title", "x", "y", "x_log", "y_log", "sides", "level", "level_label"]
KINDS = {  # of plots, and the keys that each has besides those of all
    "conditions": ["metric", "series", "conditions"],
    "numbers": ["metric", "series", "condition", "at"],
    "layers": ["conditions", "look"],
}


@dataclass(frozen=True)
class Plot:
    """What to draw.

    Attributes:
        kind: of ``KINDS``.
        part: of the study.
        conditions: of the part; one where the kind is "numbers".
        sides: of the part.
        series: metrics by what the line is of; "" where there is one alone. In "numbers" ``{x}`` stands for one of
            ``at``.
        at: places on the horizontal axis.
        look: of "layers": the monitor's "first" or "last".
        title, x, y, x_log, y_log, level, level_label: as :class:`syncbn.study.claims.result.PlotData`.
    """

    kind: str
    part: str
    conditions: tuple[str, ...]
    sides: tuple[str, ...]
    series: dict[str, str]
    at: tuple[float, ...]
    look: str
    title: str
    x: str
    y: str
    x_log: bool
    y_log: bool
    level: float | None
    level_label: str


def parse(place: str, entry: Any, parts: Mapping[str, dict[str, list[str]]]) -> Plot:
    """One entry of ``plots``.

    Args:
        place: for messages.
        entry: as the file has it.
        parts: conditions and sides of each part of the study.

    Raises:
        SettingError: a key, a part, a condition, a side or a value that there is not.
    """
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    rule_checks.one_of(f"{place}.kind", str(kind), KINDS)
    own, optional = KINDS[str(kind)], ["x_log", "y_log", "sides", "level", "level_label", "metric", "series", "look"]
    given = rule_checks.section(place, entry, [*KEYS, *own], optional=[*optional, "conditions", "condition"])
    part = rule_checks.one_of(f"{place}.part", str(given["part"]), parts)
    series = {str(name): str(metric) for name, metric in (given.get("series") or {}).items()}
    if given.get("metric") is not None:
        series |= {"": str(given["metric"])}
    if ("metric" in own and not series) or ("" in series and len(series) > 1):
        raise SettingError(f"{place}: give a metric, or series (metrics by name)")
    conditions = given.get("conditions") if given.get("condition") is None else [given["condition"]]
    chosen = rule_checks.chosen(f"{place}.conditions", conditions, parts[part]["conditions"])
    if kind == "numbers" and len(chosen) > 1:
        raise SettingError(f"{place}.condition: the part has several; use {rule_checks.one_of_these(chosen)}")
    return Plot(
        kind=str(kind),
        part=part,
        conditions=chosen,
        sides=rule_checks.chosen(f"{place}.sides", given["sides"], parts[part]["sides"]),
        series=series,
        at=tuple(rule_checks.number(f"{place}.at", each) for each in given.get("at") or ()),
        look=rule_checks.one_of(f"{place}.look", str(given.get("look") or "first"), ("first", "last")),
        title=str(given["title"]).strip(),
        x=str(given["x"]),
        y=str(given["y"]),
        x_log=rule_checks.truth(f"{place}.x_log", given["x_log"]),
        y_log=rule_checks.truth(f"{place}.y_log", given["y_log"]),
        level=None if given["level"] is None else rule_checks.number(f"{place}.level", given["level"]),
        level_label=str(given["level_label"] or ""),
    )
