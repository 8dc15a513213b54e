"""``parse``: reads the rule of a claim from ``study.claim`` and checks it against the study's parts."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, StrictInt, model_validator

from syncbn.study.claims.section import Names, Number, Section, Text, one_of, read, some_of, with_values, wrong
from syncbn.training.errors import SettingError

PLACE = "study.claim"
WORDS = ("mean", "worst", "best", "highest")  # reductions over conditions; the name of one condition selects it instead
LARGEST = "highest"
OF_BOTH = ("magnitude", "wants")  # keys of a reading that `against` cannot change
Parts = Mapping[str, Mapping[str, list[str]]]  # names of the conditions and sides of each part of the study


class Reading(Section):
    """How the runs of one side and seed are reduced to one number.

    Attributes:
        part: of the study.
        metric: its name in ``result.json``. An accuracy is read as an error in percent.
        over: the reduction over conditions, one of ``WORDS``, or the name of the only condition.
        conditions: the conditions that are read.
        usable: for ``highest``: the upper limit of the metric at a usable condition.
        magnitude: whether the absolute value of the metric is used.
        wants: which values are better.
        less: the condition whose metric is subtracted, seed by seed, so that the number is the increase over it; ""
            for none.
    """

    part: Text
    metric: Text
    over: Text = ""
    conditions: Names = ()
    usable: Number | None = None
    magnitude: StrictBool = False
    wants: Literal["lower", "higher"]
    less: Text = ""

    @property
    def asked(self) -> tuple[str, ...]:
        """All conditions whose runs are needed, including ``less``."""
        return tuple(dict.fromkeys([*self.conditions, *filter(None, [self.less])]))


class Case(Reading):
    """One question of a claim, asked of several norms, with the reading of a norm.

    Attributes:
        when: the condition in words, for the verdict "holds only WHEN".
        short: the same in at most four words, for the page's first matrix: "with sigmoid".
        sides: the norms.
        against: the reading of the compared side. The file contains only the keys that differ from the case's reading.
        against_side: the side with which the norms are compared.
        effect: whether the effect is the ratio or the difference of the two numbers.
        at_least: the required effect.
        at_most: an additional upper limit of the norm's own number; None for no limit.
        what: the measured quantity, for display; "" for the label of the metric.
        counts: whether the case counts for the verdict. Otherwise its numbers are only shown.
        name: the key of the case's section in the file.
    """

    when: Text = ""
    short: Text = ""
    sides: Names = ()
    against: Reading
    against_side: Text = Field("", alias="against.side")
    effect: Literal["ratio", "difference"]
    at_least: Number
    at_most: Number | None = None
    what: Text = ""
    counts: StrictBool = True
    name: str = ""

    @property
    def reading(self) -> Reading:
        """The reading of a norm."""
        return Reading(**{key: getattr(self, key) for key in Reading.model_fields})

    @property
    def is_ratio(self) -> bool:
        """Whether the effect is a ratio; otherwise it is a difference."""
        return self.effect == "ratio"

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, given: Any) -> Any:
        """Completes the reading of ``against`` with the case's own keys, and moves its side to ``against_side``."""
        given = with_values(given, [key for key in cls.model_fields if key not in ("against_side", "name")])
        keys = ["side", *(key for key in Reading.model_fields if key not in OF_BOTH)]
        change = with_values(given.pop("against", {}), keys, "against")
        same = {key: given[key] for key in Reading.model_fields if key in given}
        if "over" in change:
            same.pop("usable", None)
        return given | {"against.side": change.pop("side", ""), "against": same | change}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.is_ratio and self.at_least <= 0:
            raise wrong("at_least", f"{self.at_least:g}", "a ratio is above 0; 1.25 asks for 1.25 times as good")
        if self.at_most is not None and self.wants != "lower":
            raise wrong("at_most", f"{self.at_most:g}", "works with wants: lower only; leave it out")
        return self


class Figure(Section):
    """A published figure and the place of our corresponding number.

    Attributes:
        what, published, source: as in :class:`syncbn.study.claims.result.Published`.
        case: the case with our number; "" if we did not measure it.
        side: the side with our number.
        value: the published figure as a number, which decides whether ours agrees. None if both are only shown.
        tolerance: allowed deviation in either direction.
        of: which number of the row is compared.
    """

    what: Text
    published: Text
    source: Text
    case: Text = ""
    side: Text = ""
    value: Number | None = None
    tolerance: Number = 0.0
    of: Literal["value", "other", "effect"] = "effect"

    @model_validator(mode="after")
    def _has_a_case(self) -> Self:
        if self.value is not None and not self.case:
            raise wrong("value", f"{self.value:g}", "name the case and the side of our number, or leave it out")
        return self


class _Plot(Section):
    """Settings that all kinds of plot have.

    Attributes:
        part: of the study.
        sides: of the part; all sides by default.
        title, x, y, x_log, y_log, level, level_label: as in :class:`syncbn.study.claims.result.PlotData`.
    """

    part: Text
    title: Text
    x: Text
    y: Text
    x_log: StrictBool = False
    y_log: StrictBool = False
    sides: Names = ()
    level: Number | None = None
    level_label: Text = ""


class _OfMetrics(_Plot):
    """A plot of one metric, or of several series.

    Attributes:
        metric: if each side has one line.
        series: metrics by the name of the line, if each side has several.
    """

    metric: Text = ""
    series: dict[Text, Text] = Field({})

    @property
    def lines(self) -> dict[str, str]:
        """Metrics by series. ``metric`` has the series ""."""
        return self.series | ({"": self.metric} if self.metric else {})

    @model_validator(mode="after")
    def _has_lines(self) -> Self:
        if not self.lines or ("" in self.lines and len(self.lines) > 1):
            raise wrong("", None, "give a metric, or series (metrics by name)")
        return self


class ConditionsPlot(_OfMetrics):
    """A plot of metrics over the conditions of the part, by default all of them."""

    kind: Literal["conditions"]
    conditions: Names = ()


class NumbersPlot(_OfMetrics):
    """A plot of metrics over numbers in their names.

    Attributes:
        condition: of the part; "" if the part has only one.
        at: values on the horizontal axis. Each replaces ``{x}`` in the names of the metrics.
    """

    kind: Literal["numbers"]
    condition: Text = ""
    at: tuple[Number, ...]


class LayersPlot(_Plot):
    """A plot of the gradient norm by depth, with a panel for each condition, by default all of the part.

    Attributes:
        look: whether the "first" or the "last" recorded step of the gradient monitor is shown.
    """

    kind: Literal["layers"]
    conditions: Names = ()
    look: Literal["first", "last"] = "first"


Plot = Annotated[ConditionsPlot | NumbersPlot | LayersPlot, Field(discriminator="kind")]


class Claim(Section):
    """A claim and its rule.

    Attributes:
        number, text, article, source, method, baseline, sides: as in :class:`syncbn.study.claims.result.Finding`.
        cases: the questions by name, in order.
        literature: published figures.
        plots: at least one.
    """

    number: StrictInt
    text: Text
    article: Text
    source: Text = ""
    method: Text
    baseline: Text
    sides: Names
    cases: dict[Text, Case] = Field(min_length=1)
    plots: list[Plot] = Field(min_length=1)
    literature: list[Figure] = Field([])


def parse(study: Mapping[str, Any]) -> Claim:
    """Reads and checks the claim of a study. Sides and conditions that the rule omits are filled in from the study.

    Raises:
        SettingError: a key, part, condition or side does not exist, or a value is invalid. It names the setting.
    """
    claim = read(Claim, PLACE, study["claim"])
    parts = {
        str(name): {kind: [str(each) for each in part.get(kind, {"": []})] for kind in ("conditions", "sides")}
        for name, part in study["parts"].items()
    }
    cases = {name: _case(name, each, claim, parts) for name, each in claim.cases.items()}
    for at, figure in enumerate(claim.literature):
        if figure.case:
            one_of(f"{PLACE}.literature.{at}.case", figure.case, cases)
            one_of(f"{PLACE}.literature.{at}.side", figure.side, cases[figure.case].sides)
    plots = [_plot(f"{PLACE}.plots.{at}", each, parts) for at, each in enumerate(claim.plots)]
    return claim.model_copy(update={"cases": cases, "plots": plots})


def _case(name: str, case: Case, claim: Claim, parts: Parts) -> Case:
    place = f"{PLACE}.cases.{name}"
    if len(claim.cases) > 1 and not case.when:
        raise SettingError(f"{place}.when", hint="one of several cases needs words for its condition")
    own = _names(place, case, parts)
    against = case.against.model_copy(update=_names(f"{place}.against", case.against, parts))
    sides, other = case.sides or claim.sides, case.against_side or claim.baseline
    for side in sides:
        one_of(f"{place}.sides", side, claim.sides)
        one_of(f"{place}.sides", side, parts[case.part]["sides"])
    where = f"{place}.against.side" if case.against_side else f"{PLACE}.baseline"
    one_of(where, other, parts[against.part]["sides"])
    found = case.model_copy(update=own | {"name": name, "sides": sides, "against": against, "against_side": other})
    if other in sides and against == found.reading:
        raise SettingError(f"{place}.sides", other, "it is compared with itself; use others")
    return found


def _names(place: str, given: Reading, parts: Parts) -> dict[str, Any]:
    """``over`` and ``conditions`` of a reading, checked against the study's part."""
    there = parts[one_of(f"{place}.part", given.part, parts)]["conditions"]
    conditions = some_of(f"{place}.conditions", given.conditions, there)
    if not given.over and len(conditions) > 1:
        hint = f"the part has several conditions; use one of {', '.join([*WORDS, *there])}"
        raise SettingError(f"{place}.over", hint=hint)
    over = one_of(f"{place}.over", given.over or conditions[0], [*WORDS, *there])
    if over in there:
        conditions = (over,)
    if given.less:
        one_of(f"{place}.less", given.less, there)
    if over == LARGEST:
        _check_largest(place, given, conditions)
    elif given.usable is not None:
        raise SettingError(f"{place}.usable", f"{given.usable:g}", f"works with over: {LARGEST} only; leave it out")
    return {"over": over, "conditions": conditions}


def _check_largest(place: str, given: Reading, conditions: Sequence[str]) -> None:
    if given.usable is None:
        raise SettingError(f"{place}.usable", hint=f"over: {LARGEST} needs a number, what the metric may be at most")
    if not all(map(_is_number, conditions)):
        raise SettingError(f"{place}.over", LARGEST, f"conditions have to be numbers, not {', '.join(conditions)}")
    if given.less:
        hint = f"over: {LARGEST} results in a condition, not in {given.metric}; leave it out"
        raise SettingError(f"{place}.less", given.less, hint)


def _is_number(word: str) -> bool:
    """Whether a string is a finite number."""
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _plot(place: str, plot: Plot, parts: Parts) -> Plot:
    """The plot with sides and conditions from the study. Their names are checked."""
    there = parts[one_of(f"{place}.part", plot.part, parts)]
    names: dict[str, str | tuple[str, ...]] = {"sides": some_of(f"{place}.sides", plot.sides, there["sides"])}
    if not isinstance(plot, NumbersPlot):
        names["conditions"] = some_of(f"{place}.conditions", plot.conditions, there["conditions"])
    else:
        chosen = some_of(f"{place}.condition", filter(None, [plot.condition]), there["conditions"])
        if len(chosen) > 1:
            raise SettingError(f"{place}.condition", hint=f"the part has several; use one of {', '.join(chosen)}")
        names["condition"] = chosen[0]
    return plot.model_copy(update=names)
