"""Refuses settings that were added (``+name=value``, or in a file of the user's) and that nothing reads."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from syncbn.training.composition import signatures
from syncbn.training.composition.nearest import listed, nearest, suggestion
from syncbn.training.config.schema import ClusterConfig, Config, WandbConfig
from syncbn.training.errors import SettingError
from syncbn.training.loggers import chosen as chosen_loggers

HYDRAS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
# Settings that the program reads and that the target need not take, beside those that an interpolation reads.
FACTS = {"data.global_batch_size", "data.num_classes", "data.in_channels"}
FACTS |= {f"optimizer.{name}" for name in ("lr_batch", "layer_decay", "lr_scale")}
NEEDED = ("trainer", "data", "model", "norm", "module", "optimizer", "logger", "cluster")  # groups
OPTIONAL = ("timm", "torchvision")  # whose absence is reported with the command that installs them
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
NORMS = {  # norm: what each reads, beside its name
    "sync": {"group", "batch_size", "ghost_batch", "only"},
    "ghost": {"batch_size", "only", "ghost_batch"},
    "group_norm": {"num_groups", "min_channels"},
    "local": set[str](),
    "local_mean": set[str](),
    "none": set[str](),
    "shuffle": {"part"},
    "torch_sync": set[str](),
}


def check(cfg: DictConfig, hydra: Any = None) -> None:
    """Refuses a setting at the top level that no other refers to, and an argument that its target does not take.

    What cannot be judged without an import is accepted: a target with ``**kwargs``, or one that code makes.

    Args:
        cfg: composed settings; interpolations are not resolved.
        hydra: Hydra's own settings, which may refer to others.

    Raises:
        SettingError: for the first such setting.
    """
    tree = OmegaConf.to_container(cfg)
    assert isinstance(tree, dict)
    others = OmegaConf.to_container(hydra) if hydra is not None else {}
    read = " ".join(_expressions([tree, others]))
    _check_present(tree)
    chosen = (others.get("runtime") or {}).get("choices") or {} if isinstance(others, dict) else {}
    known = [field.name for field in dataclasses.fields(Config)]
    for name in tree:
        if name not in known and not _is_read(str(name), read):
            _refuse_added(str(name), tree, known)
    for name, names in _fixed(tree):
        if isinstance(tree.get(name), dict):
            _check_group(name, tree[name], names, read, chosen.get(name))
    if isinstance(tree.get("trainer"), dict):
        _check_arguments("trainer", tree["trainer"], signatures.TRAINER, read)
    if isinstance(tree.get("logger"), dict):
        _check_loggers(tree["logger"], read, chosen.get("logger"))
    for name, each in (tree.get("callbacks") or {}).items():
        if each is not None and not isinstance(each, dict):
            raise SettingError(f"callbacks.{name}", each, f"a callback has settings: callbacks.{name}._target_=CLASS")
    for name, node, target in _targets(tree, ""):
        _check_target(name, target)
        _check_arguments(name, node, target, read)


def _check_present(tree: dict[Any, Any]) -> None:
    for name in NEEDED:
        if name in tree and not isinstance(tree[name], dict) and "${" not in str(tree[name]):
            value = None if tree[name] == "???" else tree[name]
            raise SettingError(name, value, f"a run needs this group of settings; leave out ~{name} and {name}=null")


def _check_target(name: str, target: Any) -> None:
    setting = f"{name}._target_"
    if not isinstance(target, str) or not DOTTED.fullmatch(target):
        raise SettingError(setting, target, "this names no class; write module.Class, such as torch.optim.SGD")
    module = target.partition(".")[0]
    if module not in OPTIONAL and not signatures.exists(module):
        hint = f"there is no module {module} here; put its file into the current directory or beside --config-dir, "
        raise SettingError(setting, target, f"{hint}or install it")


def _is_read(name: str, expressions: str) -> bool:
    """Whether an interpolation has this setting: ``${name}``, ``${oc.select:name.more,3}``, ``${..name}``."""
    whole, last = re.escape(name), re.escape(name.rpartition(".")[2])
    return bool(re.search(rf"[{{:, ](\.*{whole}|\.+{last})(?![\w-])", expressions))


def _refuse_added(name: str, tree: dict[Any, Any], known: list[str]) -> None:
    leaves = dict(_leaves({name: tree[name]}, ""))
    full, value = next(iter(leaves.items()), (name, tree[name]))
    names = [each for group in known for each, _ in _leaves({group: tree.get(group)}, "")]
    raise SettingError(full, value, f"no part of the program reads this setting; {suggestion(full, names)}")


def _fixed(tree: dict[Any, Any]) -> Iterator[tuple[str, set[str]]]:
    """The groups whose settings are known here, with the names of these."""
    for field in dataclasses.fields(Config):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield field.name, _fields(field.type)
    yield "cluster", _fields(ClusterConfig)
    names = NORMS.get(str((tree.get("norm") or {}).get("name")))
    if names is not None:
        yield "norm", {"name", *names}


def _check_loggers(group: dict[Any, Any], read: str, choice: str | None) -> None:
    """Refuses settings of loggers that nothing reads. A custom logger is a group with a ``_target_``."""
    if "_target_" in group:
        hint = "a logger has a name, since there may be several: logger.NAME._target_=CLASS"
        raise SettingError("logger._target_", group["_target_"], hint)
    others = {name: _fields(kind) for name, kind in chosen_loggers.BUILT_IN.items()}
    own = _fields(WandbConfig) if group.get("name") == chosen_loggers.WANDB else {"name"}
    own |= {"csv", *others}
    for name, each in group.items():
        if name in others and isinstance(each, dict):
            _check_group(f"logger.{name}", each, others[name], read, None)
        elif not (isinstance(each, dict) and "_target_" in each):
            _check_group("logger", {name: each, "name": choice}, own, read, choice)


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _check_group(name: str, group: dict[Any, Any], names: set[str], read: str, choice: str | None) -> None:
    for key in group:
        if key not in names and not _is_read(f"{name}.{key}", read):
            full, known = f"{name}.{key}", [f"{name}.{each}" for each in names]
            what = f"{name}={choice or group['name']} has" if "name" in group else "there is"
            raise SettingError(full, group[key], f"{what} no such setting; {suggestion(full, known)}")


def _check_arguments(name: str, node: dict[Any, Any], target: str, read: str) -> None:
    names = signatures.arguments(target)
    if names is None:
        return
    for key in node:
        full = f"{name}.{key}"
        if key in HYDRAS or key in names or full in FACTS or _is_read(full, read):
            continue
        found = nearest(str(key), names)
        works = f"the nearest is {name}.{found[0]}" if found else listed(names)
        raise SettingError(full, node[key], f"{target} has no argument {key}; {works}")


def _targets(tree: Any, name: str) -> Iterator[tuple[str, dict[Any, Any], Any]]:
    """All parts of the settings that name a target, with their dotted names."""
    if isinstance(tree, dict):
        if tree.get("_target_") is not None and "${" not in str(tree["_target_"]):
            yield name, tree, tree["_target_"]
        for key, value in tree.items():
            yield from _targets(value, f"{name}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for key, value in enumerate(tree):
            yield from _targets(value, f"{name}.{key}")


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _expressions(tree: Any) -> Iterator[str]:
    """The interpolations in a tree of settings, as text."""
    if isinstance(tree, str):
        yield from re.findall(r"\$\{[^$}]*", tree)
    for each in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _expressions(each)
