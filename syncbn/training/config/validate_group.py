"""Checks the ``group`` of a setting against the number of ranks, by the rules of the SyncBatchNorm layer."""

import re
from typing import Any

from syncbn.nn.comm import groups
from syncbn.training.errors import SettingError


def check_group(setting: str, group: Any, world_size: int) -> None:
    """Refuses a group that is not a valid group of the layer, or whose size does not divide the world size.

    Raises:
        SettingError: the hint names the groups that work.
    """
    try:
        spec = groups.parse(group)
        if isinstance(spec, int):
            groups.check_divides(spec, world_size)
    except (TypeError, ValueError) as error:
        raise SettingError(setting, group, _without_value(str(error))) from None


def _without_value(message: str) -> str:
    """Removes the setting and its value from the layer's message ``group=3 does not divide ...``."""
    return re.sub(r'^group=("[^"]*"|\S+?):? ', "", message)
