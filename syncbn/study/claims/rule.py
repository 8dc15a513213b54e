"""The rule of a claim, as ``study.claim`` writes it down before the runs, checked against the study's parts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncbn.training.schema import SettingError

PLACE = "study.claim"
WORDS = ("mean", "worst", "best", "highest")  # how conditions become one number, besides the name of one of them
LARGEST = "highest"
KEYS = {
    "": ["number", "text", "article", "method", "baseline", "sides", "cases", "plots", "literature"],
    "cases": ["when", "part", "metric", "over", "conditions", "usable", "magnitude", "wants", "effect", "at_least"],
    "against": ["side", "part", "metric", "over", "conditions", "usable"],
    "literature": ["what", "published", "source", "case", "side", "value", "tolerance", "of"],
    "plots": ["kind", "part", "title", "x", "y", "x_log", "y_log", "sides", "level", "level_label"],
}
KEYS["cases"] += ["sides", "against", "what", "counts"]
KINDS = {  # of plots, and the keys that each has besides those of all
    "conditions": ["metric", "series", "conditions"],
    "numbers": ["metric", "series", "condition", "at"],
    "layers": ["conditions"],
}


@dataclass(frozen=True)
class Reading:
    """How runs become one number for each seed.

    Attributes:
        part: of the study.
        metric: in ``result.json``; an accuracy is an error in percent.
        over: one of ``WORDS``, or a condition.
        conditions: those that are looked at.
        usable: of ``highest``: what the metric may be at most.
        magnitude: whether its absolute value counts.
        wants: which is better, "lower" or "higher".
    """

    part: str
    metric: str
    over: str
    conditions: tuple[str, ...]
    usable: float | None
    magnitude: bool
    wants: str


@dataclass(frozen=True)
class Case:
    """One question to several norms.

    Attributes:
        name: in the file.
        when: for "holds only WHEN".
        reading: of a norm.
        sides: the norms.
        against_side: what they are held against.
        against: the reading of that.
        is_ratio: whether the effect is a ratio of the two, else a difference.
        at_least: the effect that is needed.
        what: is measured, for people; "" for what the metric is called anyhow.
        counts: whether it is judged; else its numbers are only shown.
    """

    name: str
    when: str
    reading: Reading
    sides: tuple[str, ...]
    against_side: str
    against: Reading
    is_ratio: bool
    at_least: float
    what: str
    counts: bool


@dataclass(frozen=True)
class Figure:
    """Of the literature; as :class:`syncbn.study.claims.finding.Published`, with where ours is to be found.

    Attributes:
        what, published, source: as there.
        case: of the claim; "" where we have not measured it.
        side: of the case.
        value: as a number, to say whether ours agrees; None where the two are only to be seen side by side.
        tolerance: either way.
        of: which number of the row: "value", "other" or "effect".
    """

    what: str
    published: str
    source: str
    case: str
    side: str
    value: float | None
    tolerance: float
    of: str


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
        title, x, y, x_log, y_log, level, level_label: as :class:`syncbn.study.claims.finding.PlotData`.
    """

    kind: str
    part: str
    conditions: tuple[str, ...]
    sides: tuple[str, ...]
    series: dict[str, str]
    at: tuple[float, ...]
    title: str
    x: str
    y: str
    x_log: bool
    y_log: bool
    level: float | None
    level_label: str


@dataclass(frozen=True)
class Claim:
    """A claim and its rule.

    Attributes:
        number, text, article, method, baseline, sides: as :class:`syncbn.study.claims.finding.Finding`.
        cases: the questions, in order.
        literature: figures of it.
        plots: one at least.
    """

    number: int
    text: str
    article: str
    method: str
    baseline: str
    sides: tuple[str, ...]
    cases: list[Case]
    literature: list[Figure]
    plots: list[Plot]


def parse(study: Mapping[str, Any]) -> Claim:
    """The claim of a study.

    Args:
        study: the settings under ``study``, plain, with a ``claim``.

    Raises:
        SettingError: a key, a part, a condition, a side or a value that there is not; it names the place.
    """
    given = _section(PLACE, study["claim"], KEYS[""], optional=["literature"])
    parts = {
        str(name): {kind: [str(each) for each in part.get(kind, {"": []})] for kind in ("conditions", "sides")}
        for name, part in study["parts"].items()
    }
    sides = _names(f"{PLACE}.sides", given["sides"])
    if not given["cases"] or not given["plots"]:
        raise SettingError(f"{PLACE}: a claim needs cases and plots, one of each at least")
    cases = [
        _case(f"{PLACE}.cases.{name}", str(name), each, parts, str(given["baseline"]), sides)
        for name, each in given["cases"].items()
    ]
    for case in cases if len(cases) > 1 else []:
        if not case.when:
            raise SettingError(f"{PLACE}.cases.{case.name}.when: one of several cases needs words for its condition")
    return Claim(
        number=int(_number(f"{PLACE}.number", given["number"])),
        **{key: str(given[key]).strip() for key in ("text", "article", "method", "baseline")},
        sides=sides,
        cases=cases,
        literature=[
            _figure(f"{PLACE}.literature.{place}", each, cases) for place, each in enumerate(given["literature"] or [])
        ],
        plots=[_plot(f"{PLACE}.plots.{place}", each, parts) for place, each in enumerate(given["plots"])],
    )


def _case(
    place: str,
    name: str,
    entry: Any,
    parts: Mapping[str, dict[str, list[str]]],
    baseline: str,
    all_sides: Sequence[str],
) -> Case:
    optional = ["when", "over", "conditions", "usable", "magnitude", "sides", "against", "what", "counts"]
    given = _section(place, entry, KEYS["cases"], optional=optional)
    reading = _reading(place, given, parts)
    sides = tuple(all_sides) if given["sides"] is None else _names(f"{place}.sides", given["sides"])
    for side in sides:
        _one_of(f"{place}.sides", side, all_sides)
        _one_of(f"{place}.sides", side, parts[reading.part]["sides"])
    asked = _section(f"{place}.against", given["against"] or {}, KEYS["against"], optional=KEYS["against"])
    changed = {key: value for key, value in asked.items() if value is not None}
    inherited = {key: given[key] for key in ("part", "metric", "over", "conditions", "usable", "magnitude", "wants")}
    if "over" in changed:
        inherited["usable"] = None
    against = _reading(f"{place}.against", inherited | changed, parts)
    where, other = (f"{place}.against.side", str(asked["side"])) if asked["side"] else (f"{PLACE}.baseline", baseline)
    _one_of(where, other, parts[against.part]["sides"])
    if other in sides and against == reading:
        raise SettingError(f"{place}.sides={other}: it is held against itself; use others")
    effect = _one_of(f"{place}.effect", str(given["effect"]), ("ratio", "difference"))
    at_least = _number(f"{place}.at_least", given["at_least"])
    if effect == "ratio" and at_least <= 0:
        raise SettingError(f"{place}.at_least={at_least:g}: a ratio is above 0; 1.25 asks for 1.25 times as good")
    words = {key: str(given[key] or "").strip() for key in ("when", "what")}
    counts = given["counts"] is None or _truth(f"{place}.counts", given["counts"])
    is_ratio = effect == "ratio"
    return Case(name, words["when"], reading, sides, other, against, is_ratio, at_least, words["what"], counts)


def _reading(place: str, given: Mapping[str, Any], parts: Mapping[str, dict[str, list[str]]]) -> Reading:
    part = _one_of(f"{place}.part", str(given["part"]), parts)
    there = parts[part]["conditions"]
    conditions = _chosen(f"{place}.conditions", given["conditions"], there)
    if given["over"] is None and len(conditions) > 1:
        raise SettingError(f"{place}.over: the part has several conditions; use {_or([*WORDS, *there])}")
    over = str(conditions[0] if given["over"] is None else given["over"])
    _one_of(f"{place}.over", over, [*WORDS, *there])
    usable = given["usable"]
    if over in there:
        conditions = (over,)
    if (over == LARGEST) != (usable is not None):
        says = "needs a number, what the metric may be at most" if over == LARGEST else f"is for over: {LARGEST} alone"
        raise SettingError(f"{place}.usable: {says}")
    if over == LARGEST and not all(_is_number(each) for each in conditions):
        raise SettingError(f"{place}.over={LARGEST}: conditions have to be numbers, not {', '.join(conditions)}")
    if usable is not None:
        usable = _number(f"{place}.usable", usable)
    magnitude = _truth(f"{place}.magnitude", given["magnitude"])
    wants = _one_of(f"{place}.wants", str(given["wants"]), ("lower", "higher"))
    return Reading(part, str(given["metric"]), over, conditions, usable, magnitude, wants)


def _figure(place: str, entry: Any, cases: Sequence[Case]) -> Figure:
    given = _section(place, entry, KEYS["literature"], optional=["case", "side", "value", "tolerance", "of"])
    by_name = {case.name: case for case in cases}
    case, side = (str(given[key] or "") for key in ("case", "side"))
    if case:
        _one_of(f"{place}.case", case, by_name)
        _one_of(f"{place}.side", side, by_name[case].sides)
    elif given["value"] is not None:
        raise SettingError(f"{place}.value={given['value']}: say of which case and side ours is, or leave it out")
    value = None if given["value"] is None else _number(f"{place}.value", given["value"])
    of = _one_of(f"{place}.of", str(given["of"] or "effect"), ("value", "other", "effect"))
    return Figure(
        what=str(given["what"]),
        published=str(given["published"]),
        source=str(given["source"]),
        case=case,
        side=side,
        value=value,
        tolerance=_number(f"{place}.tolerance", given["tolerance"] or 0),
        of=of,
    )


def _plot(place: str, entry: Any, parts: Mapping[str, dict[str, list[str]]]) -> Plot:
    kind = entry.get("kind") if isinstance(entry, Mapping) else None
    _one_of(f"{place}.kind", str(kind), KINDS)
    own, optional = KINDS[str(kind)], ["x_log", "y_log", "sides", "level", "level_label", "metric", "series"]
    given = _section(place, entry, [*KEYS["plots"], *own], optional=[*optional, "conditions", "condition"])
    part = _one_of(f"{place}.part", str(given["part"]), parts)
    series = {str(name): str(metric) for name, metric in (given.get("series") or {}).items()}
    if given.get("metric") is not None:
        series |= {"": str(given["metric"])}
    if ("metric" in own and not series) or ("" in series and len(series) > 1):
        raise SettingError(f"{place}: give a metric, or series (metrics by name)")
    conditions = given.get("conditions") if given.get("condition") is None else [given["condition"]]
    chosen = _chosen(f"{place}.conditions", conditions, parts[part]["conditions"])
    if kind == "numbers" and len(chosen) > 1:
        raise SettingError(f"{place}.condition: the part has several; use {_or(chosen)}")
    return Plot(
        kind=str(kind),
        part=part,
        conditions=chosen,
        sides=_chosen(f"{place}.sides", given["sides"], parts[part]["sides"]),
        series=series,
        at=tuple(_number(f"{place}.at", each) for each in given.get("at") or ()),
        title=str(given["title"]).strip(),
        x=str(given["x"]),
        y=str(given["y"]),
        x_log=_truth(f"{place}.x_log", given["x_log"]),
        y_log=_truth(f"{place}.y_log", given["y_log"]),
        level=None if given["level"] is None else _number(f"{place}.level", given["level"]),
        level_label=str(given["level_label"] or ""),
    )


def _section(place: str, given: Any, keys: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    """All keys, None where one that may be left out is."""
    if not isinstance(given, Mapping):
        raise SettingError(f"{place}={given}: use a section with {', '.join(keys)}")
    if unknown := [str(key) for key in given if key not in keys]:
        raise SettingError(f"{place}.{unknown[0]}: there is no such key; use {', '.join(keys)}")
    if missing := [key for key in keys if given.get(key) is None and key not in optional]:
        raise SettingError(f"{place}.{missing[0]}: it is missing")
    return {key: given.get(key) for key in keys}


def _names(place: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise SettingError(f"{place}={given}: use a list of names")
    return tuple(map(str, given))


def _chosen(place: str, given: Any, there: Sequence[str]) -> tuple[str, ...]:
    """Those of ``there`` that are named, all where none is."""
    if given is None:
        return tuple(there)
    return tuple(_one_of(place, each, there) for each in _names(place, given))


def _one_of(place: str, given: str, there: Iterable[str]) -> str:
    if given not in there:
        raise SettingError(f"{place}={given}: use {_or(there)}")
    return given


def _or(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"


def _number(place: str, given: Any) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool) or not math.isfinite(given):
        raise SettingError(f"{place}={given}: use a number")
    return float(given)


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _truth(place: str, given: Any) -> bool:
    if not isinstance(given, bool | None):
        raise SettingError(f"{place}={given}: use true or false")
    return bool(given)
