"""Has Hydra raise its errors: ``HYDRA_FULL_ERROR=1`` is set while it composes, and the user's value is given back."""

import os

NAME = "HYDRA_FULL_ERROR"
_UNCHANGED = object()
_given: object = _UNCHANGED  # the user's value (None: not set), while ``hide`` has replaced it


def hide() -> None:
    """Sets the variable, so that Hydra 1.3 raises an error and does not print it."""
    global _given
    if _given is _UNCHANGED:
        _given = os.environ.get(NAME)
    os.environ[NAME] = "1"


def restore() -> None:
    """Gives the user's value back: to the job, and to the processes that it starts."""
    global _given
    if _given is not _UNCHANGED:
        os.environ.pop(NAME, None)
        if isinstance(_given, str):
            os.environ[NAME] = _given
        _given = _UNCHANGED


def wanted() -> bool:
    """Whether the user asked for tracebacks."""
    return (os.environ.get(NAME) if _given is _UNCHANGED else _given) == "1"
