"""The plots that a claim's rule asks for: one pydantic model for each kind of plot."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, model_validator

from syncbn.study.claims.rules.section import Names, Number, Section, Text, one_of, some_of, wrong
from syncbn.training.errors import SettingError


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


def resolve(place: str, plot: Plot, parts: Mapping[str, Mapping[str, list[str]]]) -> Plot:
    """Fills in the sides and conditions of a plot from the study, and checks their names.

    Args:
        place: path of the plot in the settings, for error messages.
        plot: as read from the file.
        parts: names of the conditions and sides of each part of the study.

    Raises:
        SettingError: the study has no such part, side or condition.
    """
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
