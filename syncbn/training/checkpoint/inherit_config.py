"""Copies settings from the run of a checkpoint to a run that only tests it: model, norm, seed and data split."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training.config import trust
from syncbn.training.config.compare import COPIES, DEFAULTS, flat
from syncbn.training.config.ranges import plain
from syncbn.training.data import settings as data_settings
from syncbn.training.errors import AgreedError, as_typed
from syncbn.training.run_directory import paths
from syncbn.training.run_directory.paths import run_of

# The setting of each group that names its class or kind. The group's other settings are arguments of that class.
KINDS = {"model": "model._target_", "norm": "norm.name", "module": "module._target_", "data": "data._target_"}
SIZES = {"data.train_images", "data.test_images"}  # a test may have more images than that of the run, or fewer
SPLIT = ("data._target_", "data.split_seed", "data.val_fraction", "data.test_fraction", *sorted(SIZES))
# These depend on the devices of the training, and do not affect a test.
SHARE = {"norm.group", "norm.batch_size", "norm.ghost_batch"}
SHOWN = 3  # settings that an error message lists
ORIGIN = {"network": "${model}", "optimizer": "${optimizer}", "scheduler": "${scheduler}"}  # of the module's COPIES
ORIGIN |= {name: f"${{oc.select:optimizer.{name},null}}" for name in ("layer_decay", "lr_scale")}


def inherited(composed: DictConfig, overrides: Sequence[str], report: Callable[[str], None]) -> DictConfig:
    """Settings with ``model``, ``norm``, ``module``, ``seed`` and the data split of the checkpoint's run.

    Settings are only copied with ``mode=test``, and if the checkpoint lies in a run directory. The seed is copied
    because a comparison pairs runs by it.

    Args:
        composed: settings as Hydra composes them; they are not changed.
        overrides: of the command line, as Hydra lists them: ``model=mlp``, ``model.width=16``.
        report: called with a line that lists the copied settings.

    Raises:
        AgreedError: an override contradicts the run's settings, or the run has another data set. Or the run's settings
            cannot be read, or they could run code or read files here and ``trust`` is not set.
    """
    cfg = composed.copy()
    run_dir = run_of(Path(cfg.ckpt_path)) if cfg.get("mode") == "test" and cfg.ckpt_path else None
    if run_dir is None or not (file := run_dir / "config.yaml").exists():
        return cfg
    data_settings.fill(cfg.get("data"))  # model reads the number of classes and channels
    earlier = _load(file, cfg)
    if not cfg.trust:
        _refuse_untrusted(earlier, cfg, file)
    typed = {each.lstrip("+~").partition("=")[0] for each in overrides}
    taken: dict[str, Any] = {}
    contradicted: dict[str, Any] = {}
    for group in (*KINDS, "seed"):
        kind = KINDS.get(group, group)
        try:
            before, now = _compared(earlier, group), _compared(cfg, group)
        except OmegaConfBaseException:
            return cfg  # settle() reports it
        if {before.get("norm.name"), now.get("norm.name")} == {"sync", "torch_sync"}:  # both compute the same
            continue
        other_kind = before.get(kind) != now.get(kind)
        if other_kind and (group in typed or group == "data"):
            contradicted[kind] = before.get(kind)
            continue
        if not other_kind:
            before = {name: DEFAULTS[name] for name in now if name in DEFAULTS} | before
        differ = {name: value for name, value in before.items() if value != now.get(name)}
        overridden = {name for name in differ if _is_typed(name, typed - KINDS.keys())}
        if typed & SHARE:
            overridden |= SHARE
        contradicted |= {name: value for name, value in differ.items() if name in overridden - SHARE - SIZES}
        differ = {name: value for name, value in differ.items() if name not in overridden}
        if other_kind and group in KINDS:
            own = [key for key in earlier[group] if f"{group}.{key}" not in COPIES]
            copies = {key: ORIGIN[key] for key in ORIGIN if group == "module" and key in earlier[group]}
            cfg[group] = OmegaConf.merge(OmegaConf.masked_copy(earlier[group], own), copies)
        for name, value in differ.items():
            try:
                OmegaConf.update(cfg, name, value, force_add=True)
            except OmegaConfBaseException as error:
                why = " ".join(str(error).split())
                raise AgreedError(name, as_typed(value)[:80], f"{paths.short(file)} sets it: {why}") from error
        taken |= differ
    if contradicted:
        works = "set data= as that run did" if KINDS["data"] in contradicted else "leave out what differs"
        hint = f"its run has {_listed(contradicted)}, and its test has to have the same; {works}"
        raise AgreedError("ckpt_path", cfg.ckpt_path, hint)
    if taken:
        report(f"taken from the run of the checkpoint: {_listed(taken)}")
    return cfg


def _load(file: Path, cfg: DictConfig) -> DictConfig:
    """Reads ``config.yaml`` of the checkpoint's run; interpolations are not resolved."""
    try:
        earlier = OmegaConf.load(file)  # PyYAML's safe loader: a tag such as !!python/object is an error
        written = OmegaConf.to_container(earlier)
        if isinstance(written, dict) and all(isinstance(written.get(group), dict) for group in KINDS):
            assert isinstance(earlier, DictConfig)
            return earlier
        why = f"it lacks one of {', '.join(KINDS)}"
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        why = " ".join(str(error).split())[:200]
    hint = f"{file} does not hold the settings of a run ({why}); move it away and set model, norm and module yourself"
    raise AgreedError("ckpt_path", cfg.ckpt_path, hint)


def _refuse_untrusted(earlier: DictConfig, cfg: DictConfig, file: Path) -> None:
    """Refuses settings of the checkpoint's run that could run code or read files here."""
    written: Any = OmegaConf.to_container(earlier)
    refused: dict[str, Any] = {}
    for group in (*KINDS, "seed"):
        theirs = written.get(group)
        try:
            ours: Any = plain(cfg.get(group))
        except OmegaConfBaseException:
            return  # settle() reports it
        if group == "data":  # only the split is copied, and another data set is refused later
            theirs = {key: theirs[key] for key in theirs if f"data.{key}" in SPLIT}
            if theirs.get("_target_") != (ours or {}).get("_target_"):
                refused |= trust.refused(theirs.pop("_target_", None), None, "data._target_")
        elif isinstance(theirs, dict):
            theirs = {key: each for key, each in theirs.items() if f"{group}.{key}" not in COPIES}
        refused |= trust.refused(theirs, ours, group)
    if refused:
        shown = {name: as_typed(value)[:80] for name, value in list(refused.items())[:SHOWN]}
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        hint = f"{paths.short(file)} sets it, and it could run code or read files here; "
        hint += "set it yourself too, or add trust=true if you trust that file"
        raise AgreedError(f"{_listed(shown)}{more}", hint=hint)


def _compared(cfg: DictConfig, group: str) -> dict[str, Any]:
    """The settings of a group that a test has to share with the checkpoint's run, by flat names."""
    if group == "data":
        names = [name for name in SPLIT if OmegaConf.select(cfg, name) is not None]
    else:
        written = OmegaConf.to_container(cfg)
        assert isinstance(written, dict)
        skipped = tuple(f"{name}." for name in COPIES)
        names = [name for name in flat({group: written[group]}) if not f"{name}.".startswith(skipped)]
    values = {name: plain(OmegaConf.select(cfg, name)) for name in names}
    if values.get("norm.batch_size") is not None:  # group and ghost_batch are computed from it
        values.pop("norm.group", None)
        values.pop("norm.ghost_batch", None)
    if isinstance(only := values.get("norm.only"), str):
        values["norm.only"] = [only]
    return values


def _is_typed(name: str, typed: set[str]) -> bool:
    """Whether the command line sets this setting, or a group of settings that it belongs to."""
    return any(f"{name}.".startswith(f"{each}.") for each in typed)


def _listed(values: dict[str, Any]) -> str:
    """The settings as on a command line: ``name=value name=value``."""
    return " ".join(f"{name}={as_typed(value)}" for name, value in values.items())
