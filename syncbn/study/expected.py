"""Figures that papers have, or that follow from them, to stand beside a study's results: ``expected`` of a part."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from syncbn.training.schema import SettingError


@dataclass(frozen=True)
class Expected:
    """One figure, in one of these forms: a ``value``; a ``difference`` to ``baseline``; a ratio to it that is
    ``at_most`` so much; or words alone, in ``what``.

    Attributes:
        what: is meant, with its unit: "test error, %".
        source: the paper and, where it was not read there, how the figure came to be known.
        side: of the comparison; None for what is said of the whole part.
        where: settings of the runs that it is about; none for all.
        value: of ``side``.
        baseline: another side.
        difference: ``side`` minus ``baseline``.
        at_most: ``side`` divided by ``baseline`` is no more than this.
        tolerance: of ``value`` or ``difference``, either way, in the same unit.
    """

    what: str
    source: str
    side: str | None = None
    where: dict[str, Any] = field(default_factory=dict)
    value: float | None = None
    baseline: str | None = None
    difference: float | None = None
    at_most: float | None = None
    tolerance: float | None = None

    def is_of(self, side: str, cfg: DictConfig) -> bool:
        """Whether it is about a run of this side with these settled settings."""
        return side == self.side and all(OmegaConf.select(cfg, name) == value for name, value in self.where.items())

    def __str__(self) -> str:
        within = "" if self.tolerance is None else f" +- {self.tolerance:g}"
        if self.value is not None:
            return f"{self.what}: {self.value:g}{within} ({self.source})"
        if self.difference is not None:
            return f"{self.what}, minus that of {self.baseline}: {self.difference:+g}{within} ({self.source})"
        if self.at_most is not None:
            return f"{self.what}, over that of {self.baseline}: at most {self.at_most:g} ({self.source})"
        return f"{self.what} ({self.source})"


def of(name: str, part: Mapping[str, Any]) -> list[Expected]:
    """What a part of a study expects, in the order of its file.

    Args:
        name: of the part, for messages.
        part: plain, as in the study's file.

    Raises:
        SettingError: an entry of another form, or about a side that the part does not have.
    """
    return [_entry(f"study.parts.{name}.expected[{i}]", each, part) for i, each in enumerate(part.get("expected", []))]


def _entry(name: str, given: Mapping[str, Any], part: Mapping[str, Any]) -> Expected:
    sides = [str(side) for side in part.get("sides", {})]
    entry = dict(given)
    for key in ("side", "baseline"):
        if entry.get(key) is not None:
            entry[key] = str(entry[key])
            if entry[key] not in sides:
                raise SettingError(f"{name}.{key}={entry[key]}: use one of the part's sides, {', '.join(sides)}")
    try:
        found = Expected(**entry)
    except TypeError:
        raise SettingError(
            f"{name}: {', '.join(entry)}: use what and source, and of {', '.join(_OPTIONAL)} what is needed"
        ) from None
    figures = [key for key in ("value", "difference", "at_most") if getattr(found, key) is not None]
    compares = any(key in figures for key in ("difference", "at_most"))
    if len(figures) > 1 or (figures and found.side is None) or compares != (found.baseline is not None):
        raise SettingError(
            f"{name}: {', '.join(entry)}: use value, or baseline and difference, or baseline and at_most, each with "
            "side; or none of them"
        )
    return found


_OPTIONAL = [key for key in Expected.__dataclass_fields__ if key not in ("what", "source")]
