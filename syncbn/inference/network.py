"""Builds the network of a run from its settings, without running code that the run directory names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from syncbn.nn.conversion import convert
from syncbn.nn.modules import Synchronized
from syncbn.training import import_paths, torchvision_internals
from syncbn.training.config import trust
from syncbn.training.errors import SettingError, as_typed
from syncbn.training.models.build import build
from syncbn.training.network.init_from import unwrapped
from syncbn.training.norm import replace
from syncbn.training.run_directory import record

SHOWN = 3  # settings that an error message lists
REPLACED = ("none", "group_norm")  # norms that change the network itself
MOST_GROUPS = 65536


def described(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The argument of the LightningModule that is its network, and the network's settings; None if it has no such."""
    module, model = settings.get("module"), settings.get("model")
    arguments = module if isinstance(module, dict) else {}
    for name, each in arguments.items():
        if isinstance(each, dict) and "_target_" in each and (name == "network" or each == model):
            return str(name), each
    return None


def built(settings: dict[str, Any], file: str, name: str, *, trusted: bool, versions: str = "") -> nn.Module:
    """The object that settings describe by ``_target_``, on the CPU, with the global random numbers left alone.

    Args:
        settings: of a network or a LightningModule.
        file: that they are from, for error messages.
        name: of the settings: "model" or "module".
        trusted: whether any target may be called.
        versions: the end of an error that another version may explain.

    Raises:
        SettingError: a target or an argument that is refused, or that cannot be built.
    """
    torchvision_internals.allow_missing_operators()
    if not trusted and (found := trust.refused(settings, None, name)):
        for place, value in found.items():
            if place.endswith("._target_") and trust.is_missing(value):
                hint = f"{file} sets it, and there is no such class here{versions}"
                raise SettingError(place, value, hint)
        shown = " ".join(f"{name}={as_typed(value)[:80]}" for name, value in list(found.items())[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        hint = f"{file} sets it, and it could run code or read files here; pass the network (network=), "
        raise SettingError(f"{shown}{more}", hint=f"{hint}or trust that file (trust=True, --trust)")
    if settings.get("_target_") in trust.BY_NAME:
        settings = settings | {"pretrained": False}  # the checkpoint has all weights
    try:
        with torch.random.fork_rng(devices=[]):
            made = build(settings)
    except SettingError:
        raise
    except Exception as error:  # of the user's class, of Hydra, of a package that is missing
        cause = error.__cause__ or error
        what = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        hint = f"{file} sets it, and it cannot be built ({what}){versions}"
        raise SettingError(f"{name}._target_", settings.get("_target_"), hint) from error
    if not isinstance(made, nn.Module):
        hint = f"{file} sets it, and it makes a {type(made).__name__}, not an nn.Module"
        raise SettingError(f"{name}._target_", settings.get("_target_"), hint)
    return made


def find_own_files(run_dir: Path | None, settings: Mapping[str, Any]) -> None:
    """Make the user's files importable that a trusted run names: in the current directory and beside --config-dir."""
    command = {} if run_dir is None else record.read(run_dir, "run").get("command")
    arguments = [each for each in command if isinstance(each, str)] if isinstance(command, list) else []
    import_paths.add(arguments)
    import_paths.allow({group: settings.get(group) for group in ("model", "module", "data")})


def apply_norm(module: nn.Module, norm: Any) -> None:
    """Replace the batch norm layers for ``norm=none`` and ``group_norm``, as the run did.

    Raises:
        SettingError: ``norm`` has an unusable number of groups.
    """
    if not isinstance(norm, dict) or norm.get("name") not in REPLACED:
        return
    for name in ("num_groups", "min_channels") if norm["name"] == "group_norm" else ():
        value = norm.get(name)
        if not isinstance(value, int) or not 1 <= value <= MOST_GROUPS:
            raise SettingError(f"norm.{name}", value, "the run's config.yaml sets it; it must be 1 or more")
    replace.prepare_model(module, norm)


def plain(network: nn.Module) -> nn.Module:
    """Make synchronized layers torch's own, in place; one with an activation stays, as torch has no such class."""
    return convert.revert(network, only=lambda name, layer: isinstance(layer, Synchronized) and not layer.fused_act)


def part_of(module: nn.Module, part: str | None, where: str) -> nn.Module:
    """The network of a LightningModule: its ``network``, its only part with parameters, or itself if it has a forward.

    Args:
        module: a LightningModule.
        part: the name of the part to take; "" for the module itself; None to choose it.
        where: the checkpoint, for error messages.

    Raises:
        SettingError: it has no such part, or several and none is chosen.
    """
    parts = {name: each for name, each in module.named_children() if any(True for _ in each.parameters())}
    if part is not None:
        try:
            return _uncompiled(module.get_submodule(part))
        except AttributeError:
            raise SettingError("part", part, f"{where} has no such part; use one of {', '.join(parts)}") from None
    if isinstance(own := getattr(module, "network", None), nn.Module):
        return _uncompiled(own)
    if len(parts) == 1 and not list(module.parameters(recurse=False)):
        return _uncompiled(next(iter(parts.values())))
    if type(module).forward.__qualname__ != "LightningModule.forward":
        return module
    names = ", ".join(parts)
    raise SettingError("part", None, f"{type(module).__name__} has several networks: {names}; choose one of them")


def _uncompiled(network: nn.Module) -> nn.Module:
    """The network that ``torch.compile`` was called with, if it was."""
    name, inner = next(iter(network.named_children()), ("", network))
    return inner if name and not unwrapped(f"{name}.") else network
