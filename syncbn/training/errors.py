"""Error classes for invalid settings, which end a run with a one-line error."""

from typing import Any, TypeVar

_Kind = TypeVar("_Kind", bound="SettingError")
_ABSENT = object()


class SettingError(ValueError):
    """A setting that cannot work, printed as one line: ``setting=value: hint``.

    Args:
        setting: the name as the user types it, ``trainer.devices``; or another cause, such as a file.
        value: of the setting, printed as on the command line (``null``, ``true``). Left out, only the name is printed.
        hint: what is wrong and what works, ``"there are 2 GPUs; use at most 2"``.

    Attributes:
        setting: as given.
        value: as given; None where it was left out.
        hint: as given.
    """

    def __init__(self, setting: str, value: Any = _ABSENT, hint: str = "") -> None:
        shown = setting if value is _ABSENT else f"{setting}={as_typed(value)}"
        super().__init__(f"{shown}: {hint}" if hint else shown)
        self.setting, self.value, self.hint = setting, None if value is _ABSENT else value, hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the fields: BaseException would call the class with the printed line."""
        return (_restored, (type(self), str(self), self.setting, self.value, self.hint))

    def agreed(self) -> "AgreedError":
        """The same error as an :class:`AgreedError`."""
        return _restored(AgreedError, str(self), self.setting, self.value, self.hint)


class AgreedError(SettingError):
    """An error that all ranks raise, so that only one rank prints it."""


def as_typed(value: object) -> str:
    """A value of a setting as the user types it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _restored(kind: type[_Kind], line: str, setting: str, value: Any, hint: str) -> _Kind:
    error = kind.__new__(kind, line)
    error.setting, error.value, error.hint = setting, value, hint
    return error
