"""What a test alone takes from the run that its checkpoint lies in: the network, and which images are the test's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training.config import trust
from syncbn.training.config.compare import COPIES, DEFAULTS, flat
from syncbn.training.errors import AgreedError, as_typed
from syncbn.training.run_directory import paths
from syncbn.training.run_directory.paths import run_of

# What a group is: its other settings belong to that.
KINDS = {"model": "model._target_", "norm": "norm.name", "module": "module._target_", "data": "data._target_"}
SPLIT = ("data._target_", "data.split_seed", "data.val_fraction", "data.test_fraction")
SHARE = {"norm.group", "norm.batch_size", "norm.ghost_batch"}  # of training alone, and bound to its devices
SHOWN = 3  # settings in an error
ORIGIN = {"module.network": "${model}", "module.optimizer": "${optimizer}", "module.scheduler": "${scheduler}"}


def inherited(composed: DictConfig, overrides: Sequence[str], say: Callable[[str], None]) -> DictConfig:
    """Settings with ``model``, ``norm``, ``module``, ``seed`` and the split of the data of the checkpoint's run.

    That is for ``mode=test`` and a checkpoint that lies in a run directory; else the settings stay as they are. The
    seed is among them because a comparison pairs runs by it.

    Args:
        composed: settings as Hydra composes them; they are not changed.
        overrides: what the user has said, as Hydra lists it: ``model=mlp``, ``model.width=16``.
        say: takes a line on what was taken.

    Raises:
        AgreedError: the user has said something else, or the data are others; the run's settings cannot be read, or
            they could run code or read files here and the user has not set ``trust``.
    """
    cfg = composed.copy()
    run_dir = run_of(Path(cfg.ckpt_path)) if cfg.get("mode") == "test" and cfg.ckpt_path else None
    if run_dir is None or not (file := run_dir / "config.yaml").exists():
        return cfg
    earlier = _load(file, cfg)
    if not cfg.trust:
        _refuse_untrusted(earlier, cfg, file)
    said = {each.lstrip("+~").partition("=")[0] for each in overrides}
    taken: dict[str, Any] = {}
    against: dict[str, Any] = {}
    for group in (*KINDS, "seed"):
        kind = KINDS.get(group, group)
        try:
            before, now = _of(earlier, group), _of(cfg, group)
        except OmegaConfBaseException:
            return cfg  # settle() reports it
        if {before.get("norm.name"), now.get("norm.name")} == {"sync", "torch_sync"}:  # the same norm twice
            continue
        another = before.get(kind) != now.get(kind)
        if another and (group in said or group == "data"):
            against[kind] = before.get(kind)
            continue
        if not another:
            before = {name: DEFAULTS[name] for name in now if name in DEFAULTS} | before
        differ = {name: value for name, value in before.items() if value != now.get(name)}
        spoken = {name for name in differ if _is_said(name, said - KINDS.keys())}
        if said & SHARE:
            spoken |= SHARE
        against |= {name: value for name, value in differ.items() if name in spoken - SHARE}
        differ = {name: value for name, value in differ.items() if name not in spoken}
        if another and group in KINDS:
            own = [key for key in earlier[group] if f"{group}.{key}" not in COPIES]
            cfg[group] = OmegaConf.merge(OmegaConf.masked_copy(earlier[group], own), _originals(earlier, group))
        for name, value in differ.items():
            try:
                OmegaConf.update(cfg, name, value, force_add=True)
            except OmegaConfBaseException as error:
                why = " ".join(str(error).split())
                raise AgreedError(name, as_typed(value)[:80], f"{paths.short(file)} sets it: {why}") from error
        taken |= differ
    if against:
        works = "set data= as that run did" if KINDS["data"] in against else "leave out what differs"
        raise AgreedError(
            "ckpt_path", cfg.ckpt_path, f"its run has {_listed(against)}, and its test has to have the same; {works}"
        )
    if taken:
        say(f"as in the run of the checkpoint: {_listed(taken)}")
    return cfg


def _load(file: Path, cfg: DictConfig) -> DictConfig:
    """The settings of the checkpoint's run, with interpolations as they are written."""
    try:
        earlier = OmegaConf.load(file)  # PyYAML's safe loader: a tag such as !!python/object is an error
        written = OmegaConf.to_container(earlier)
        if isinstance(written, dict) and all(isinstance(written.get(group), dict) for group in KINDS):
            assert isinstance(earlier, DictConfig)
            return earlier
        why = f"it lacks one of {', '.join(KINDS)}"
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        why = " ".join(str(error).split())[:200]
    raise AgreedError(
        "ckpt_path",
        cfg.ckpt_path,
        f"{file} does not hold the settings of a run ({why}); move it away and set model, norm and module yourself",
    )


def _refuse_untrusted(earlier: DictConfig, cfg: DictConfig, file: Path) -> None:
    written: Any = OmegaConf.to_container(earlier)
    refused: dict[str, Any] = {}
    for group in (*KINDS, "seed"):
        theirs = written.get(group)
        try:
            ours: Any = _plain(cfg.get(group))
        except OmegaConfBaseException:
            return  # settle() reports it
        if group == "data":  # the rest is the user's, and other data are refused
            theirs = {key: theirs[key] for key in theirs if f"data.{key}" in SPLIT}
            if theirs.get("_target_") != (ours or {}).get("_target_"):
                refused |= trust.refused(theirs.pop("_target_", None), None, "data._target_")
        elif isinstance(theirs, dict):
            theirs = {key: each for key, each in theirs.items() if f"{group}.{key}" not in COPIES}
        refused |= trust.refused(theirs, ours, group)
    if refused:
        shown = {name: as_typed(value)[:80] for name, value in list(refused.items())[:SHOWN]}
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise AgreedError(
            f"{_listed(shown)}{more}",
            hint=f"{paths.short(file)} sets it, and it could run code or read files here; set it yourself too, or add "
            "trust=true if you trust that file",
        )


def _of(cfg: DictConfig, group: str) -> dict[str, Any]:
    """What has to agree of a group, by flat names."""
    if group == "data":
        names = [name for name in SPLIT if OmegaConf.select(cfg, name) is not None]
    else:
        written = OmegaConf.to_container(cfg)
        assert isinstance(written, dict)
        skipped = tuple(f"{name}." for name in COPIES)
        names = [name for name in flat({group: written[group]}) if not f"{name}.".startswith(skipped)]
    values = {name: _plain(OmegaConf.select(cfg, name)) for name in names}
    if values.get("norm.batch_size") is not None:  # it picks the two
        values.pop("norm.group", None)
        values.pop("norm.ghost_batch", None)
    if isinstance(only := values.get("norm.only"), str):
        values["norm.only"] = [only]
    return values


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _is_said(name: str, said: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{each}.") for each in said)


def _originals(earlier: DictConfig, group: str) -> DictConfig:
    """For the copies of other groups in this one, where they come from."""
    parts = {name.partition(".")[2]: origin for name, origin in ORIGIN.items() if group == name.partition(".")[0]}
    return OmegaConf.create({name: origin for name, origin in parts.items() if name in earlier[group]})


def _listed(values: dict[str, Any]) -> str:
    """As on a command line."""
    return " ".join(f"{name}={as_typed(value)}" for name, value in values.items())
