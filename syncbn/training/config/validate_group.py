"""Checks the ``group`` of a setting against the number of ranks, by the rules of the layer."""

import re
from typing import Any

from syncbn.nn.comm import groups
from syncbn.training.errors import SettingError


def check_group(setting: str, group: Any, world_size: int) -> None:
    """Refuses a group that the layer does not know, or that does not divide the world.

    Raises:
        SettingError: with the groups that work.
    """
    try:
        spec = groups.parse(group)
        if isinstance(spec, int):
            groups.check_divides(spec, world_size)
    except (TypeError, ValueError) as error:
        raise SettingError(setting, group, _without_value(str(error))) from None


def _without_value(message: str) -> str:
    """The layer's ``group=3 does not divide ...`` without its beginning."""
    return re.sub(r'^group=("[^"]*"|\S+?):? ', "", message)
