"""Refuses settings of another run's ``config.yaml`` that could run code or read files here.

Hydra calls the object that a ``_target_`` names, with the settings beside it as arguments. So a target of another run
is only called if the user's own settings have the same target in the same place, or if it is a network, layer,
optimizer or scheduler of syncbn, torch, torchvision or timm.
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

from syncbn.training import import_paths
from syncbn.training.errors import SettingError
from syncbn.training.vision_packages import install_command

INSTALL = f"install it: {install_command()}"
OWN = "put its file into the current directory or beside --config-dir, or install it"
# NAMED: dotted paths that a target may have; others are not imported. DEFINED: modules that may define its class.
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
# Arguments of torchvision and timm that load weights from a file or a URL. The checkpoint has the weights anyway.
LOADS = {
    *("weights", "weights_backbone", "pretrained", "pretrained_backbone", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("checkpoint_path", "cache_dir"),
}
# Functions of this package that build a network of these packages by its name.
BY_NAME = {"syncbn.training.timm_network": "timm", "syncbn.training.torchvision_network": "torchvision"}
KEY = re.compile(r"[\w-]+")
WORDS = re.compile(r"[\w .,+=-]{,200}")  # matches no path, URL, expression or module:name
DOTTED = re.compile(r"([A-Za-z_]\w*)(\.[A-Za-z_]\w*)+")


def is_safe(target: Any) -> bool:
    """Whether a target is a class or constructor that only builds a part of a network, an optimizer or a scheduler.

    Only modules of the packages in ``NAMED`` are imported for this.

    Raises:
        SettingError: the package is not installed.
    """
    if not isinstance(target, str) or not NAMED.fullmatch(target):
        return False
    package = BY_NAME.get(target, target.partition(".")[0])
    spec = find_spec(package)
    # Not installed: a package of this name in the current directory is none of those that are known to be safe.
    if spec is None or import_paths.is_added(spec.origin or next(iter(spec.submodule_search_locations or ()), None)):
        raise SettingError("_target_", target, f"there is no package {package} here; {INSTALL}")
    if target in BY_NAME:
        return True
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


def is_missing(target: Any) -> bool:
    """Whether syncbn or torch has no object of this name, as another version of them may have."""
    package = target.partition(".")[0] if isinstance(target, str) and NAMED.fullmatch(target) else ""
    if package not in ("syncbn", "torch"):
        return False
    home, _, name = target.rpartition(".")
    try:
        return not hasattr(import_module(home), name)
    except ImportError:
        return True


def refused(theirs: Any, ours: Any, name: str, *, known: bool = True, package: str = "") -> dict[str, Any]:
    """Finds the settings of another run that must not be used.

    Args:
        theirs: a part of another run's settings; interpolations are not resolved.
        ours: the same part of the user's own settings, resolved. Equal values under equal targets are trusted.
        name: of that part, such as ``model``.
        known: all targets above this part are those of the user's settings.
        package: of the nearest target above; "" if there is none.

    Returns:
        The refused settings by their flat names.
    """
    if isinstance(theirs, list):
        theirs = dict(enumerate(theirs))
        ours = dict(enumerate(ours)) if isinstance(ours, list) else {}
    if not isinstance(theirs, dict):
        same = known and type(theirs) is type(ours) and theirs == ours
        return {} if same or _is_plain(theirs, called=bool(package)) else {name: theirs}
    ours = ours if isinstance(ours, dict) else {}
    if "_target_" in theirs:
        target = theirs["_target_"]
        known = known and isinstance(target, str) and ours.get("_target_") == target
        if not known and not is_safe(target):
            return {f"{name}._target_": target}
        package = BY_NAME.get(target, target.partition(".")[0])
        # mode=test builds the network of ``model`` without pretrained weights, whatever this setting is.
        if name == "model" and target in BY_NAME and isinstance(theirs.get("pretrained"), bool):
            theirs = {key: each for key, each in theirs.items() if key != "pretrained"}
    # _args_ are positional arguments, which have no names that could be checked.
    loads = {*LOADS, "_args_"} if package in ("torchvision", "timm") else set()
    found: dict[str, Any] = {}
    for key, each in theirs.items():
        place, own = f"{name}.{key}", ours.get(key)
        is_own = known and each == own
        is_odd = not KEY.fullmatch(str(key))  # Hydra and OmegaConf read dots and brackets in it
        if is_odd or (key in loads and each not in (None, False) and not is_own):
            found[place] = each
        elif key != "_target_":
            found |= refused(each, own, place, known=known, package=package)
    return found


def _is_plain(value: Any, *, called: bool) -> bool:
    """Whether a value is a number or a plain string. An argument of a call must not name a file or a module either."""
    if value is None or isinstance(value, bool | int | float):
        return True
    if not isinstance(value, str) or "${" in value:
        return False
    return not called or (
        bool(WORDS.fullmatch(value)) and not _names_module(value) and not (value and Path(value).exists())
    )


def _names_module(text: str) -> bool:
    """Whether a string is ``module.name`` of an importable module; a class may import such an argument."""
    dotted = DOTTED.fullmatch(text)
    return dotted is not None and find_spec(dotted[1]) is not None and not is_safe(text)


def _find(target: str) -> Any:
    """Finds the object that Hydra's ``_locate`` would find; None if the path leads into another module.

    For example ``x.os.system`` leads through the module ``x`` into ``os``.
    """
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
    """Whether a function is a model constructor that torchvision or timm has registered under this name."""
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
