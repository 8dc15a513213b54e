"""Names the setting by which a network does not fit its data, from torch's error in the first step.

Nothing runs before training for this: no random state, statistics or memory is touched, and a run takes no longer.
"""

import re
from typing import Any

from omegaconf import DictConfig

from syncbn.training.errors import AgreedError, SettingError

# Messages of torch 2.13.
CHANNELS = r"expected input\[.*\] to have (\d+) channels, but got (\d+) channels"
FEATURES = r"shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)"
LABEL = r"Target (-?\d+) is out of bounds"


def explained(error: Exception, cfg: DictConfig) -> SettingError | None:
    """The error of the setting to change; None if torch's error has another cause.

    Args:
        error: raised in the first step.
        cfg: settings of the run. A setting of ``model`` is named if it has the value that torch reports.
    """
    model, text = cfg.get("model"), str(error)
    if not isinstance(model, DictConfig):
        return None
    if found := re.search(CHANNELS, text):
        takes, has = int(found[1]), int(found[2])
        return _of(model, "chan", takes, has, f"the images of the data have {has} channels")
    if found := re.search(FEATURES, text):
        has, takes = int(found[1]), int(found[2])
        return _of(model, "in_", takes, has, f"a sample of the data has {has} numbers")
    found = re.search(LABEL, text) if isinstance(error, IndexError) else None
    classes = model.get("num_classes")
    if found and isinstance(classes, int):
        hint = f"the data have the label {found[1]}, and labels count from 0 to {classes - 1}; "
        hint += f"use {int(found[1]) + 1} or more" if int(found[1]) >= classes else "change the labels"
        return SettingError("model.num_classes", classes, hint)
    return None


def _of(model: DictConfig, word: str, takes: int, has: int, fact: str) -> SettingError | None:
    names = [str(name) for name, value in model.items() if word in str(name) and _is(value, takes)]
    return AgreedError(f"model.{names[0]}", takes, f"{fact}; use {has}") if len(names) == 1 else None


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == number
