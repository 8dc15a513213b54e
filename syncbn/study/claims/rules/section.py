"""A section of a claim's settings as a pydantic model; the first setting that is wrong becomes a one-line error."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from syncbn.training.errors import SettingError

# YAML reads the names 0.1 and true as a number and a truth value.
Text = Annotated[str, BeforeValidator(lambda given: str(given) if isinstance(given, bool | int | float) else given)]
Names = Annotated[tuple[Text, ...], Field(min_length=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
TAGGED = "plots"  # in this list pydantic puts the kind of an entry, which is its discriminator, after the index
HINTS = {  # by pydantic's type of error, where its own words would mislead somebody who writes YAML
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
    """Base of the models. An unknown key is an error; a key without a value (``null``) counts as left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, given: Any) -> Any:
        return with_values(given, cls.model_fields)


Model = TypeVar("Model", bound=Section)


def read(model: type[Model], place: str, given: Any) -> Model:
    """Validates a section.

    Args:
        model: of the section.
        place: where the section is in the settings, for error messages.
        given: the section as the file has it.

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
    """A section's keys that have a value. To be called in a validator of the section that ``place`` lies in.

    Raises:
        PydanticCustomError: it is no section, or has a key that is not one of ``keys``.
    """
    if not isinstance(given, Mapping):
        raise wrong(place, given, f"use a section with {', '.join(keys)}")
    for key in given:
        if key not in keys:  # pydantic's own error does not list the keys
            words = {"key": f"{place}.{key}".lstrip("."), "keys": ", ".join(keys)}
            raise PydanticCustomError("unknown_key", "there is no such key; use {keys}", words)
    return {key: value for key, value in given.items() if value is not None}


def wrong(key: str, value: Any, hint: str) -> PydanticCustomError:
    """What a validator of a whole section raises: the key that is wrong, its value (None: not shown), what works."""
    return PydanticCustomError("wrong", "{hint}", {"key": key, "value": value, "hint": hint})


def one_of(place: str, given: str, choices: Iterable[str]) -> str:
    """A name that the study has.

    Raises:
        SettingError: it is none of the choices.
    """
    if given not in choices:
        raise SettingError(place, given, f"use one of {', '.join(choices)}")
    return given


def some_of(place: str, given: Iterable[str], choices: Iterable[str]) -> tuple[str, ...]:
    """The names that are given, each one that the study has; all of its names where none is given."""
    return tuple(one_of(place, name, choices) for name in given) or tuple(choices)


def _on_one_line(given: Any) -> Any:
    return given.replace("\n", " ") if isinstance(given, str) else given
