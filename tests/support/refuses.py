"""``with refuses("trainer.devices", 9):`` asserts the fields of the SettingError that the body raises."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from syncbn.training.errors import SettingError

ANY = object()


@contextmanager
def refuses(setting: str, value: Any = ANY, *words: str, kind: type[SettingError] = SettingError) -> Iterator[None]:
    """Fails unless the body raises this error.

    Args:
        setting: that the error names.
        value: that it names; any by default.
        words: that its hint has to contain.
        kind: the exact class.
    """
    with pytest.raises(SettingError) as caught:
        yield
    error = caught.value
    assert type(error) is kind, repr(error)
    assert error.setting == setting, str(error)
    assert value is ANY or error.value == value, str(error)
    assert [word for word in words if word not in error.hint] == [], str(error)
    assert "\n" not in str(error), str(error)
