"""The form of published or expected figures, each with its source, in the setting ``expected``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import OmegaConf

from syncbn.training.config.plan import Plan
from syncbn.training.errors import SettingError


@dataclass(frozen=True)
class Expected:
    """One published figure, in one of three forms: ``value``, ``difference`` to ``baseline``, or ``at_most``.

    Attributes:
        what: the quantity with its unit: "test error, %", "sync minus local, points".
        source: the paper; if the figure was not read there, also where it was read.
        side: of the comparison.
        where: settings that select conditions, by their names in the comparison, such as ``devices``; {} selects all.
        value: the metric of ``side``, as it is shown.
        baseline: another side.
        difference: the metric of ``side`` minus that of ``baseline``.
        at_most: upper limit of the ratio of the seconds per step, ``side`` over ``baseline``.
        tolerance: allowed deviation from ``value`` or ``difference`` in either direction; None is 0.
        metric: the name of the metric; "" applies to every metric.
    """

    what: str = ""
    source: str = ""
    side: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None
    baseline: str | None = None
    difference: float | None = None
    at_most: float | None = None
    tolerance: float | None = None
    metric: str = ""

    def is_of(self, side: str, plan: Plan) -> bool:
        """Whether the figure applies to a run of this side with this plan."""
        at = {name: plan.replicas if name == "devices" else OmegaConf.select(plan.cfg, name) for name in self.where}
        return side == self.side and at == self.where

    def __str__(self) -> str:
        within = "" if self.tolerance is None else f" +- {self.tolerance:g}"
        if self.value is not None:
            return f"{self.what}: {self.value:g}{within} ({self.source})"
        if self.difference is not None:
            return f"{self.what}: {self.difference:+g}{within} ({self.source})"
        return f"{self.what}: at most {self.at_most:g} ({self.source})"


def parse(entries: Sequence[Mapping[str, Any]]) -> list[Expected]:
    """Validates the entries of ``expected``.

    Raises:
        SettingError: an entry has an unknown key, or does not have exactly one of the three forms.
    """
    return [_entry(each) for each in entries]


def _entry(given: Mapping[str, Any]) -> Expected:
    known = {each.name for each in fields(Expected)}
    if unknown := given.keys() - known:
        raise SettingError(
            f"expected: {', '.join(sorted(unknown))}", hint=f"there is no such key; use {', '.join(sorted(known))}"
        )
    sides = {name: str(given[name]) for name in ("side", "baseline") if given.get(name) is not None}
    found = Expected(**{**given, **sides, "where": given.get("where") or {}})
    forms = [name for name in ("value", "difference", "at_most") if getattr(found, name) is not None]
    if len(forms) != 1 or not found.side or (forms != ["value"] and found.baseline is None):
        raise SettingError(
            f"expected: {found.what}",
            hint="give side with value, or side and baseline with either difference or at_most",
        )
    return found
