"""The plots of a claim's rule, a model for each kind."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, model_validator

from syncbn.study.claims.rules.section import Names, Number, Section, Text, one_of, some_of, wrong
from syncbn.training.errors import SettingError


class _Plot(Section):
    """What all kinds have.

    Attributes:
        part: of the study.
        sides: of the part; all where none is given.
        title, x, y, x_log, y_log, level, level_label: as :class:`syncbn.study.claims.result.PlotData`.
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
        metric: of the only line of a side.
        series: metrics by what the line is of.
    """

    metric: Text = ""
    series: dict[Text, Text] = Field({})

    @property
    def lines(self) -> dict[str, str]:
        """Metrics by series; "" is the series of ``metric``."""
        return self.series | ({"": self.metric} if self.metric else {})

    @model_validator(mode="after")
    def _has_lines(self) -> Self:
        if not self.lines or ("" in self.lines and len(self.lines) > 1):
            raise wrong("", None, "give a metric, or series (metrics by name)")
        return self


class ConditionsPlot(_OfMetrics):
    """Metrics over the conditions of the part; all conditions where none is given."""

    kind: Literal["conditions"]
    conditions: Names = ()


class NumbersPlot(_OfMetrics):
    """Metrics over numbers that are part of their names.

    Attributes:
        condition: of the part; "" where the part has one alone.
        at: places on the horizontal axis; ``{x}`` in the name of a metric represents one of them.
    """

    kind: Literal["numbers"]
    condition: Text = ""
    at: tuple[Number, ...]


class LayersPlot(_Plot):
    """The gradient's norm by depth, a panel for each condition; all conditions of the part where none is given.

    Attributes:
        look: the "first" or the "last" step that the monitor recorded.
    """

    kind: Literal["layers"]
    conditions: Names = ()
    look: Literal["first", "last"] = "first"


Plot = Annotated[ConditionsPlot | NumbersPlot | LayersPlot, Field(discriminator="kind")]


def resolve(place: str, plot: Plot, parts: Mapping[str, Mapping[str, list[str]]]) -> Plot:
    """The plot with the names of its sides and conditions.

    Args:
        place: of the plot in the settings, for error messages.
        plot: as the file has it.
        parts: conditions and sides of each part of the study.

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
