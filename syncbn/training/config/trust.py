"""Which settings of another run's ``config.yaml`` may be used: those that cannot run code or read files here.

Hydra calls what a ``_target_`` names, with the values beside it. So a target of another run is called only if the
user's own settings have it in the same place, or if it is a network, layer, optimizer or scheduler of syncbn, torch,
torchvision or timm.
"""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from syncbn.training.errors import SettingError

INSTALL = "install it (torchvision and timm: pip install '.[vision]')"
# Where a target may be named, and where its class may be defined. A dotted path outside of these is not imported.
NAMED = re.compile(
    r"(syncbn|torch\.nn(\.modules)?|torch\.optim|torchvision\.(models|ops|transforms)|timm(\.(models|layers|loss|optim))?)"
    r"(\.[a-z]\w*)*\.[A-Za-z]\w*",
    re.ASCII,
)
DEFINED = re.compile(
    r"(syncbn|torch\.nn\.modules|torch\.optim|torchvision\.(models|ops|transforms))(\.\w+)*"
    r"|timm\.(models|layers|loss|optim)(\.[a-z]\w*)*"  # timm.models._features_fx generates code from names
)
KINDS = (nn.Module, Optimizer, LRScheduler)
# Arguments of torchvision and timm that load weights from a file or an address. The checkpoint has the weights anyway.
LOADS = {
    *("weights", "weights_backbone", "pretrained", "pretrained_backbone", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("checkpoint_path", "cache_dir"),
}
KEY = re.compile(r"[\w-]+")
WORDS = re.compile(r"[\w .,+=-]{,200}")  # no path, address, expression or module:name
DOTTED = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)+")


def refused(theirs: Any, ours: Any, name: str) -> dict[str, Any]:
    """Settings that must not be used, by their flat names.

    Args:
        theirs: a part of another run's settings, with interpolations as they are written.
        ours: the same part of the user's own settings, resolved. Equal values under equal targets are the user's own.
        name: of that part, as ``model``.
    """
    return _refused(theirs, ours, name, known=True, package="")


def is_safe(target: Any) -> bool:
    """Whether a target is a class or constructor that does no more than build a part of a network or its training.

    Only modules of the packages in ``NAMED`` are imported for this.

    Raises:
        SettingError: the package is not installed.
    """
    if not isinstance(target, str) or not NAMED.fullmatch(target):
        return False
    package = target.partition(".")[0]
    if find_spec(package) is None:
        raise SettingError("_target_", target, f"there is no package {package} here; {INSTALL}")
    try:
        found = _find(target)
    except Exception:  # no such module; torchvision raises RuntimeError beside another build of torch
        return False
    if isinstance(found, type):
        return (
            issubclass(found, KINDS)
            and not issubclass(found, GraphModule)
            and bool(DEFINED.fullmatch(found.__module__))
        )
    return found is not None and _is_constructor(found, target)


def _refused(theirs: Any, ours: Any, name: str, *, known: bool, package: str) -> dict[str, Any]:
    """``known``: all targets above are the user's own; ``package``: that of the nearest target, "" if there is none."""
    if isinstance(theirs, list):
        theirs = dict(enumerate(theirs))
        ours = dict(enumerate(ours)) if isinstance(ours, list) else {}
    if not isinstance(theirs, dict):
        return {} if (known and _same(theirs, ours)) or _is_plain(theirs, called=bool(package)) else {name: theirs}
    ours = ours if isinstance(ours, dict) else {}
    if "_target_" in theirs:
        target = theirs["_target_"]
        known = known and isinstance(target, str) and ours.get("_target_") == target
        if not known and not is_safe(target):
            return {f"{name}._target_": target}
        package = target.partition(".")[0]
    # By position an argument has no name that could be checked.
    loads = {*LOADS, "_args_"} if package in ("torchvision", "timm") else set()
    found: dict[str, Any] = {}
    for key, each in theirs.items():
        place, own = f"{name}.{key}", ours.get(key)
        is_own = known and each == own
        is_odd = not KEY.fullmatch(str(key))  # Hydra and OmegaConf read dots and brackets in it
        if is_odd or (key in loads and each not in (None, False) and not is_own):
            found[place] = each
        elif key != "_target_":
            found |= _refused(each, own, place, known=known, package=package)
    return found


def _same(theirs: Any, ours: Any) -> bool:
    return type(theirs) is type(ours) and bool(theirs == ours)


def _is_plain(value: Any, *, called: bool) -> bool:
    """Whether a value is a number or a word; an argument of something ``called`` must not name a file either."""
    if value is None or isinstance(value, bool | int | float):
        return True
    if not isinstance(value, str) or "${" in value:
        return False
    return not called or (bool(WORDS.fullmatch(value)) and not _names_module(value) and not _is_file(value))


def _names_module(text: str) -> bool:
    """Whether it is ``module.name``, which a class may import."""
    dotted = DOTTED.fullmatch(text)
    return dotted is not None and find_spec(dotted[1]) is not None and not is_safe(text)


def _is_file(text: str) -> bool:
    return bool(text) and Path(text).exists()


def _find(target: str) -> Any:
    """What Hydra's ``_locate`` finds, or None where the way there leaves the module that it names (``x.os.system``)."""
    *parts, name = target.split(".")
    found = import_module(parts[0])
    for end in range(2, len(parts) + 1):
        path = ".".join(parts[:end])
        try:
            found = getattr(found, parts[end - 1])
        except AttributeError:
            found = import_module(path)
        if not isinstance(found, ModuleType) or found.__name__ != path:
            return None
    return getattr(found, name, None)


def _is_constructor(function: Any, target: str) -> bool:
    """Whether a function builds a network that torchvision or timm has registered by this name."""
    package, name = target.partition(".")[0], target.rpartition(".")[2]
    if package == "torchvision":
        from torchvision import models

        return function is models.get_model or (
            name in models.list_models() and models.get_model_builder(name) is function
        )
    if package == "timm":
        import timm  # type: ignore[import-not-found,unused-ignore]  # an optional package

        return function is timm.create_model or (timm.is_model(name) and timm.model_entrypoint(name) is function)
    return False
