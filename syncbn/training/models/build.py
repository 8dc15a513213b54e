"""Builds the object that settings describe by ``_target_``. Imports what the target needs, and no Lightning itself."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from syncbn.training.config.trust import INSTALL, OWN
from syncbn.training.errors import SettingError


def build(cfg: Any) -> Any:
    """Builds the object that ``cfg._target_`` names.

    Its arguments are converted to plain lists and dicts: modules may save them in checkpoints, which take plain data
    only.
    """
    try:
        return instantiate(cfg, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, SettingError):
            raise cause from None
        missing = None if cause is None else cause.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and "." not in missing.name:
            target = str(cause).split("'")[1]
            hint = INSTALL if missing.name in ("torchvision", "timm") else OWN
            raise SettingError("_target_", target, f"there is no package {missing.name} here; {hint}") from error
        raise
