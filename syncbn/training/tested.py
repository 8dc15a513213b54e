"""What a test alone takes from the run that its checkpoint lies in: the network, and which images are the test's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training.attempts import DEFAULTS
from syncbn.training.files import DamagedError
from syncbn.training.flat import COPIES, flat
from syncbn.training.identity import run_of
from syncbn.training.record import settings
from syncbn.training.schema import AgreedError

# What a group is: its other settings belong to that.
KINDS = {"model": "model._target_", "norm": "norm.name", "module": "module._target_", "data": "data._target_"}
SPLIT = ("data._target_", "data.split_seed", "data.val_fraction", "data.test_fraction")
SHARE = {"norm.group", "norm.batch_size", "norm.ghost_batch"}  # of training alone, and bound to its devices
ORIGIN = {"module.network": "${model}", "module.optimizer": "${optimizer}", "module.scheduler": "${scheduler}"}


def take(cfg: DictConfig, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Sets ``model``, ``norm``, ``module``, ``seed`` and the split of the data to those of the checkpoint's run.

    In place, with ``mode=test`` and a checkpoint that lies in a run directory; else nothing happens. The seed is among
    them because a comparison pairs runs by it.

    Args:
        cfg: settings as they were composed, not yet settled.
        overrides: what the user has said, as Hydra lists it: ``model=mlp``, ``model.width=16``.
        say: takes a line on what was taken.

    Raises:
        AgreedError: the user has said something else, or the data are others.
    """
    run_dir = run_of(Path(cfg.ckpt_path)) if cfg.get("mode") == "test" and cfg.ckpt_path else None
    try:
        earlier = None if run_dir is None else settings(run_dir)
    except DamagedError as error:
        say(f"{error}: model, norm and data are not taken from it, but as they are set here")
        return
    if earlier is None:
        return
    said = {each.lstrip("+~").partition("=")[0] for each in overrides}
    taken: dict[str, Any] = {}
    against: dict[str, Any] = {}
    for group in (*KINDS, "seed"):
        kind = KINDS.get(group, group)
        try:
            before, now = _of(earlier, group), _of(cfg, group)
        except OmegaConfBaseException:
            return  # config.settle says what it is
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
            cfg[group] = OmegaConf.merge(earlier[group], _originals(earlier, group))
        for name, value in differ.items():
            OmegaConf.update(cfg, name, value, force_add=True)
        taken |= differ
    if against:
        raise AgreedError(
            f"ckpt_path={cfg.ckpt_path}: the run that it is of has {_listed(against)}, and its test is to have the "
            f"same; {'say data= as that run did' if KINDS['data'] in against else 'leave out what says otherwise'}"
        )
    if taken:
        say(f"as in the run of the checkpoint: {_listed(taken)}")


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
    return " ".join(f"{name}={_text(value)}" for name, value in values.items())


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
