"""The types of settings with a range; each has a hint that names the values that work."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

LONGEST_TIMEOUT = 2_000_000  # seconds, 23 days; torch counts milliseconds in 32 bits


def hint(words: str) -> WrapValidator:
    """Replaces pydantic's message with a hint that names valid values."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("setting", "{hint}", {"hint": words}) from None

    return WrapValidator(validate)


Count = Annotated[int, Field(strict=True, ge=1), hint("use a whole number, 1 or more")]
Auto = Annotated[
    Literal["auto"] | Annotated[int, Field(strict=True, ge=1)], hint("use a whole number, 1 or more, or auto")
]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), hint("use a number, 0 or more")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), hint("use a number above 0")]
Flag = Annotated[bool, Field(strict=True), hint("use true or false")]
Share = Annotated[float, Field(strict=True, ge=0, le=1), hint("use a number from 0 to 1")]
Inner = Annotated[float, Field(strict=True, gt=0, lt=1), hint("use a number above 0 and below 1, such as 0.999")]
Seconds = Annotated[
    float,
    Field(strict=True, gt=0, le=LONGEST_TIMEOUT),
    hint(f"use a number above 0 and up to {LONGEST_TIMEOUT}, in seconds"),
]
Globs = Annotated[
    str | list[Annotated[str, Field(strict=True)]] | None,
    hint('use names with *, as a list: ["network.stem*"], or null'),
]


Whole = Annotated[int, Field(strict=True, ge=0), hint("use a whole number, 0 or more")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), hint("use a number")]
OrFlag = Flag | None
Batches = Annotated[
    Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(strict=True, ge=0, le=1)] | None,
    hint("use a whole number of batches, a share of them from 0.0 to 1.0, or null for all"),
]
TrainingBatches = Annotated[
    Annotated[int, Field(strict=True, ge=1)] | Annotated[float, Field(strict=True, gt=0, le=1)] | None,
    hint("use a whole number of batches, 1 or more, a share of them up to 1.0, or null for all"),
]
Limit = Annotated[
    Literal[-1] | Annotated[int, Field(strict=True, ge=1)] | None,
    hint("use a whole number, 1 or more, or null for no limit"),
]
Duration = Annotated[str, Field(strict=True, pattern=r"^\d+:\d\d:\d\d:\d\d$")] | dict[str, float]


class Group(BaseModel):
    """The settings of a group that have a range; others are accepted."""

    model_config = ConfigDict(extra="allow")
