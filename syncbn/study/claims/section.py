"""Reads sections of a claim's settings into pydantic models and reports the first wrong setting as one line."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from syncbn.training.errors import SettingError

# YAML reads the names 0.1 and true as a number and a boolean.
Text = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, bool | int | float) else given)]
Names = Annotated[tuple[Text, ...], Field(min_length=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TAGGED = "plots"  # in error locations of this list, pydantic puts the discriminator (the kind) after the index
HINTS = {  # by pydantic's error type, for messages that would mislead the author of a YAML file
    "missing": "it is missing",
    "union_tag_not_found": "it is missing",
    "union_tag_invalid": "use one of {expected_tags}",
    "bool_type": "use true or false",
    "dict_type": "use a section",
    "model_attributes_type": "use a section",
    "too_short": "use a list of one or more",
    "tuple_type": "use a list",
}


class Section(BaseModel):
    """Base class of the models. An unknown key is an error. A key whose value is ``null`` counts as missing."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, given: Any) -> Any:
        return with_values(given, cls.model_fields)


Model = TypeVar("Model", bound=Section)


def read(model: type[Model], place: str, given: Any) -> Model:
    """Validates a section as read from the file. ``place`` is its path in the settings, for error messages.

    Raises:
        SettingError: a key or a value does not fit the model.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        words = first.get("ctx", {})
        loc = [str(part) for at, part in enumerate(first["loc"]) if not (at == 2 and first["loc"][0] == TAGGED)]
        setting = ".".join(filter(None, [place, *loc, words.get("key", words.get("discriminator", "")).strip("'")]))
        value = words.get("tag", words["value"] if "value" in words else first["input"])
        is_shown = value is not None and first["type"] not in ("missing", "union_tag_not_found", "unknown_key")
        template = HINTS.get(first["type"])
        hint = template.format(**words) if template else first["msg"].replace("Input should be", "use")
        shown = {"value": _on_one_line(value)} if is_shown else {}
        raise SettingError(_on_one_line(setting), **shown, hint=_on_one_line(hint)) from error


def with_values(given: Any, keys: Iterable[str], place: str = "") -> dict[str, Any]:
    """The keys of a section that have a value. Call this in a validator of the section that contains ``place``.

    Raises:
        PydanticCustomError: ``given`` is not a section, or has a key that is not in ``keys``.
    """
    if not isinstance(given, Mapping):
        raise wrong(place, given, f"use a section with {', '.join(keys)}")
    for key in given:
        if key not in keys:  # pydantic's own error does not list the keys
            words = {"key": f"{place}.{key}".lstrip("."), "keys": ", ".join(keys)}
            raise PydanticCustomError("unknown_key", "there is no such key; use {keys}", words)
    return {key: value for key, value in given.items() if value is not None}


def wrong(key: str, value: Any, hint: str) -> PydanticCustomError:
    """The error for a validator of a section to raise. A value of None is not shown."""
    return PydanticCustomError("wrong", "{hint}", {"key": key, "value": value, "hint": hint})


def one_of(place: str, given: str, choices: Iterable[str]) -> str:
    """Returns the given name if it is one of the choices; otherwise raises a SettingError."""
    if given not in choices:
        raise SettingError(place, given, f"use one of {', '.join(choices)}")
    return given


def some_of(place: str, given: Iterable[str], choices: Iterable[str]) -> tuple[str, ...]:
    """The given names, or all choices if none is given. Raises a SettingError if a name is not one of the choices."""
    return tuple(one_of(place, name, choices) for name in given) or tuple(choices)


def _on_one_line(given: Any) -> Any:
    return given.replace("\n", " ") if isinstance(given, str) else given
