"""What papers say of a comparison, or what follows from it: figures, each with whence it is, for ``expected``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import OmegaConf

from syncbn.training.config.plan import Plan
from syncbn.training.errors import SettingError


@dataclass(frozen=True)
class Expected:
    """One figure of a side, in one of three forms: ``value``; ``difference`` to ``baseline``; ``at_most``.

    Attributes:
        what: is meant, with its unit: "test error, %", "sync minus local, points".
        source: the paper and, where it was not read there, how the figure came to be known.
        side: of the comparison.
        where: settings that tell a condition, as the comparison names them: ``devices`` for all of them; {} for all.
        value: of the metric, as it is shown.
        baseline: another side.
        difference: ``side`` minus ``baseline``, of the metric.
        at_most: the seconds that a step takes, ``side`` over ``baseline``, are not more than this.
        tolerance: of ``value`` or ``difference``, either way, as far as we let ours be off; None is 0.
        metric: that it is about; "" for whatever is compared.
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
        """Whether it is about a run of this side with this plan."""
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
    """What a study's file, or a caller, expects.

    Raises:
        SettingError: an entry has other keys, or is of none of the forms or of two.
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
