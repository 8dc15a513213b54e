"""The rule of a claim, as ``study.claim`` writes it down before the runs, checked against the study's parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncbn.study.claims import rule_checks, rule_plots
from syncbn.training.errors import SettingError

PLACE = "study.claim"
WORDS = ("mean", "worst", "best", "highest")  # how conditions become one number, besides the name of one of them
LARGEST = "highest"
KEYS = {
    "": ["number", "text", "article", "method", "baseline", "sides", "cases", "plots", "literature"],
    "cases": [
        *("when", "part", "metric", "over", "conditions", "usable", "less", "magnitude"),
        *("wants", "effect", "at_least", "at_most", "sides", "against", "what", "counts"),
    ],
    "against": ["side", "part", "metric", "over", "conditions", "usable", "less"],
    "literature": ["what", "published", "source", "case", "side", "value", "tolerance", "of"],
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
        less: the condition whose metric is taken away, seed by seed: what is left is the rise over it; "" for none.
    """

    part: str
    metric: str
    over: str
    conditions: tuple[str, ...]
    usable: float | None
    magnitude: bool
    wants: str
    less: str = ""

    @property
    def asked(self) -> tuple[str, ...]:
        """The conditions whose runs it needs."""
        return tuple(dict.fromkeys([*self.conditions, *filter(None, [self.less])]))


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
        at_most: what the norm's own number may be, besides; None where nothing is asked of it.
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
    at_most: float | None = None


@dataclass(frozen=True)
class Figure:
    """Of the literature; as :class:`syncbn.study.claims.result.Published`, with where ours is to be found.

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
class Claim:
    """A claim and its rule.

    Attributes:
        number, text, article, method, baseline, sides: as :class:`syncbn.study.claims.result.Finding`.
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
    plots: list[rule_plots.Plot]


def parse(study: Mapping[str, Any]) -> Claim:
    """The claim of a study.

    Args:
        study: the settings under ``study``, plain, with a ``claim``.

    Raises:
        SettingError: a key, a part, a condition, a side or a value that there is not; it names the place.
    """
    given = rule_checks.section(PLACE, study["claim"], KEYS[""], optional=["literature"])
    parts = {
        str(name): {kind: [str(each) for each in part.get(kind, {"": []})] for kind in ("conditions", "sides")}
        for name, part in study["parts"].items()
    }
    sides = rule_checks.names(f"{PLACE}.sides", given["sides"])
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
        number=int(rule_checks.number(f"{PLACE}.number", given["number"])),
        **{key: str(given[key]).strip() for key in ("text", "article", "method", "baseline")},
        sides=sides,
        cases=cases,
        literature=[
            _figure(f"{PLACE}.literature.{place}", each, cases) for place, each in enumerate(given["literature"] or [])
        ],
        plots=[rule_plots.parse(f"{PLACE}.plots.{place}", each, parts) for place, each in enumerate(given["plots"])],
    )


def _case(
    place: str,
    name: str,
    entry: Any,
    parts: Mapping[str, dict[str, list[str]]],
    baseline: str,
    all_sides: Sequence[str],
) -> Case:
    needed = ("part", "metric", "wants", "effect", "at_least")
    optional = [key for key in KEYS["cases"] if key not in needed]
    given = rule_checks.section(place, entry, KEYS["cases"], optional=optional)
    reading = _reading(place, given, parts)
    sides = tuple(all_sides) if given["sides"] is None else rule_checks.names(f"{place}.sides", given["sides"])
    for side in sides:
        rule_checks.one_of(f"{place}.sides", side, all_sides)
        rule_checks.one_of(f"{place}.sides", side, parts[reading.part]["sides"])
    asked = rule_checks.section(f"{place}.against", given["against"] or {}, KEYS["against"], optional=KEYS["against"])
    changed = {key: value for key, value in asked.items() if value is not None}
    inherited = {key: given[key] for key in ("magnitude", "wants", *KEYS["against"][1:])}
    if "over" in changed:
        inherited["usable"] = None
    against = _reading(f"{place}.against", inherited | changed, parts)
    where, other = (f"{place}.against.side", str(asked["side"])) if asked["side"] else (f"{PLACE}.baseline", baseline)
    rule_checks.one_of(where, other, parts[against.part]["sides"])
    if other in sides and against == reading:
        raise SettingError(f"{place}.sides={other}: it is held against itself; use others")
    effect = rule_checks.one_of(f"{place}.effect", str(given["effect"]), ("ratio", "difference"))
    at_least = rule_checks.number(f"{place}.at_least", given["at_least"])
    if effect == "ratio" and at_least <= 0:
        raise SettingError(f"{place}.at_least={at_least:g}: a ratio is above 0; 1.25 asks for 1.25 times as good")
    at_most = None if given["at_most"] is None else rule_checks.number(f"{place}.at_most", given["at_most"])
    if at_most is not None and reading.wants != "lower":
        raise SettingError(f"{place}.at_most={at_most:g}: is for wants: lower alone; leave it out")
    words = {key: str(given[key] or "").strip() for key in ("when", "what")}
    counts = given["counts"] is None or rule_checks.truth(f"{place}.counts", given["counts"])
    is_ratio = effect == "ratio"
    return Case(name, words["when"], reading, sides, other, against, is_ratio, at_least, words["what"], counts, at_most)


def _reading(place: str, given: Mapping[str, Any], parts: Mapping[str, dict[str, list[str]]]) -> Reading:
    part = rule_checks.one_of(f"{place}.part", str(given["part"]), parts)
    there = parts[part]["conditions"]
    conditions = rule_checks.chosen(f"{place}.conditions", given["conditions"], there)
    if given["over"] is None and len(conditions) > 1:
        raise SettingError(
            f"{place}.over: the part has several conditions; use {rule_checks.one_of_these([*WORDS, *there])}"
        )
    over = str(conditions[0] if given["over"] is None else given["over"])
    rule_checks.one_of(f"{place}.over", over, [*WORDS, *there])
    usable = given["usable"]
    if over in there:
        conditions = (over,)
    if (over == LARGEST) != (usable is not None):
        says = "needs a number, what the metric may be at most" if over == LARGEST else f"is for over: {LARGEST} alone"
        raise SettingError(f"{place}.usable: {says}")
    if over == LARGEST and not all(rule_checks.is_number(each) for each in conditions):
        raise SettingError(f"{place}.over={LARGEST}: conditions have to be numbers, not {', '.join(conditions)}")
    if usable is not None:
        usable = rule_checks.number(f"{place}.usable", usable)
    magnitude = rule_checks.truth(f"{place}.magnitude", given["magnitude"])
    wants = rule_checks.one_of(f"{place}.wants", str(given["wants"]), ("lower", "higher"))
    less = "" if given["less"] is None else rule_checks.one_of(f"{place}.less", str(given["less"]), there)
    if less and over == LARGEST:
        raise SettingError(
            f"{place}.less={less}: over: {LARGEST} gives a condition, no {given['metric']}; leave it out"
        )
    return Reading(part, str(given["metric"]), over, conditions, usable, magnitude, wants, less)


def _figure(place: str, entry: Any, cases: Sequence[Case]) -> Figure:
    given = rule_checks.section(place, entry, KEYS["literature"], optional=["case", "side", "value", "tolerance", "of"])
    by_name = {case.name: case for case in cases}
    case, side = (str(given[key] or "") for key in ("case", "side"))
    if case:
        rule_checks.one_of(f"{place}.case", case, by_name)
        rule_checks.one_of(f"{place}.side", side, by_name[case].sides)
    elif given["value"] is not None:
        raise SettingError(f"{place}.value={given['value']}: say of which case and side ours is, or leave it out")
    value = None if given["value"] is None else rule_checks.number(f"{place}.value", given["value"])
    of = rule_checks.one_of(f"{place}.of", str(given["of"] or "effect"), ("value", "other", "effect"))
    return Figure(
        what=str(given["what"]),
        published=str(given["published"]),
        source=str(given["source"]),
        case=case,
        side=side,
        value=value,
        tolerance=rule_checks.number(f"{place}.tolerance", given["tolerance"] or 0),
        of=of,
    )
