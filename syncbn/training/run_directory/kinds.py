"""Checks ``run.json`` and ``result.json``: the types of the values that the program reads back."""

from typing import Any, NamedTuple

STATUSES = ("running", "finished", "failed", "interrupted")


class Each(NamedTuple):
    """A dict whose values are all of this kind."""

    kind: Any


NUMBER = (int, float)
# The types of the values that are read back. Each value may be missing or null.
KINDS: dict[str, dict[str, Any]] = {
    "run": {
        **dict.fromkeys(("started", "ended", "tests", "begun_from", "goes_on_from"), str),
        **{"versions": Each(str), "git": dict, "normalization_batch": int, "overrides": list},
    },
    "result": {
        **dict.fromkeys(("monitored", "test", "precise", "fit", "corrupted", "adapted", "classes"), Each(NUMBER)),
        **dict.fromkeys(("seconds", "epochs", "steps", "epochs_before", "images_per_second"), NUMBER),
        **{"target": dict, "checkpoint": str, "tested": str},
    },
}


def missing_value(name: str, contents: dict[str, Any]) -> str:
    """The first value that is missing or has a wrong type in ``run.json`` or ``result.json``; "" if all are valid."""
    if name == "run" and contents.get("status") not in STATUSES:
        return "known status"
    if name == "result" and not contents:
        return "results"
    wrong = (key for key, kind in KINDS.get(name, {}).items() if not _is(contents.get(key), kind))
    return next((f"valid {key}" for key in wrong), "")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of this kind of ``KINDS``; None is of every kind."""
    if value is None:
        return True
    if isinstance(kind, Each):
        return isinstance(value, dict) and all(_is(each, kind.kind) for each in value.values())
    return isinstance(value, kind) and not (kind is NUMBER and isinstance(value, bool))
