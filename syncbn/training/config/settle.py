"""Makes the plan of a run from composed settings: checks all settings and fills in those that are ``auto`` or null."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from syncbn.nn import batch_planning
from syncbn.training.config import ranges, validate, validate_optimization
from syncbn.training.config.machine import Launched, Machine
from syncbn.training.config.plan import Plan
from syncbn.training.config.validate import check_group, divisors
from syncbn.training.data import settings as data_settings
from syncbn.training.data import shards
from syncbn.training.distributed import slurm
from syncbn.training.errors import SettingError

DEFAULT_BATCH_SIZE = 32


def settle(composed: DictConfig, machine: Machine, run_dir: Path) -> Plan:
    """Makes the plan of a run.

    The settings of the plan are *settled*: interpolations are resolved, ``trainer.accelerator``, ``trainer.devices``
    and ``trainer.num_nodes`` have their final values, and ``data.batch_size`` (per device) and
    ``data.global_batch_size`` are both set. The settings as Hydra composes them are not changed.

    Raises:
        SettingError: for the first setting that cannot work.
    """
    cfg = composed.copy()
    data_settings.fill(cfg.get("data"))
    ranges.check(cfg)
    if cfg.get("simulate") is not None and cfg.trainer.devices == "auto":
        cfg.trainer.devices = 1
    _settle_devices(cfg, machine)
    replicas = int(cfg.get("simulate") or cfg.trainer.devices * cfg.trainer.num_nodes)
    validate.check_trainer(cfg)
    _settle_batch_size(cfg.data, replicas)
    _settle_shards(cfg.data, replicas)
    _settle_norm(cfg.norm, cfg.data.batch_size, replicas)
    validate_optimization.settle_lr(cfg)
    data_settings.check(cfg)
    plan = Plan.of(cfg, run_dir)
    validate.check(plan)
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise ranges.unresolved(error) from error
    validate_optimization.separate(cfg)
    return Plan.of(cfg, run_dir)


def _settle_devices(cfg: DictConfig, machine: Machine) -> None:
    trainer, launched = cfg.trainer, machine.launched
    if trainer.accelerator == "auto":
        trainer.accelerator = "gpu" if machine.gpus else "cpu"
    if trainer.accelerator == "cuda":
        trainer.accelerator = "gpu"
    if launched is not None:
        _take_launched(trainer, launched, machine.gpus)
    if cfg.cluster.name == "slurm" and (launched is None or launched.by != "srun"):
        hint = "srun did not start this process; use sbatch slurm/train.sbatch, or cluster=local"
        raise SettingError("cluster", "slurm", hint)
    if trainer.num_nodes == "auto":
        trainer.num_nodes = 1
    if trainer.accelerator == "gpu" and not machine.gpus:
        hint = "torch sees no GPU here; use trainer.accelerator=cpu (or auto)"
        raise SettingError("trainer.accelerator", "gpu", hint)
    if trainer.devices == "auto":
        trainer.devices = machine.gpus if trainer.accelerator == "gpu" else 2
    _check_fits(trainer, machine)


def _take_launched(trainer: DictConfig, launched: Launched, gpus: int) -> None:
    """Takes the numbers of nodes and devices from the launcher."""
    found = {"num_nodes": launched.num_nodes, "devices": launched.devices}
    automatic = trainer.devices == "auto" and trainer.accelerator == "gpu"
    if launched.by == "srun" and automatic and launched.devices < gpus:
        hint = f"{gpus} GPUs, but {launched.devices} tasks on this node; ask for "
        hint += f"{slurm.header(launched.num_nodes, gpus)}, or use trainer.devices={launched.devices}"
        raise SettingError("Slurm", hint=hint)
    for name, number in found.items():
        if trainer[name] not in ("auto", number):
            wanted = {key: trainer[key] if trainer[key] != "auto" else found[key] for key in found}
            works = f"ask for {slurm.header(wanted['num_nodes'], wanted['devices'])}"
            works = works if launched.by == "srun" else "make them agree"
            hint = f"{launched.by} started {number}; leave it out, or {works}"
            raise SettingError(f"trainer.{name}", trainer[name], hint)
        trainer[name] = number


def _check_fits(trainer: DictConfig, machine: Machine) -> None:
    devices, launched = trainer.devices, machine.launched
    if trainer.accelerator == "gpu" and devices > machine.gpus:
        per_node = f"#SBATCH --gpus-per-node={devices}, which each task sees all of"
        works = per_node if launched is not None and launched.by == "srun" else f"use at most {machine.gpus}"
        raise SettingError("trainer.devices", devices, f"there are {machine.gpus} GPUs; {works}")
    most = max(4 * machine.cores, 8)  # each device is a process: more than cores are slow, many more are a mistake
    if trainer.accelerator == "cpu" and devices > most:
        hint = f"{devices} processes on {machine.cores} CPU cores; use at most {most}"
        raise SettingError("trainer.devices", devices, hint)


def _settle_batch_size(data: DictConfig, replicas: int) -> None:
    per_device, total = data.get("batch_size"), data.get("global_batch_size")
    if total is None:
        total = (DEFAULT_BATCH_SIZE if per_device is None else per_device) * replicas
    elif total % replicas:
        near = " or ".join(str(n) for n in (total // replicas * replicas, (total // replicas + 1) * replicas) if n)
        hint = f"{replicas} devices cannot share it equally; use a multiple of {replicas}, such as {near}"
        raise SettingError("data.global_batch_size", total, hint)
    elif per_device is not None and per_device * replicas != total:
        hint = f"it disagrees with data.global_batch_size={total}: {per_device} on each of {replicas} devices make "
        raise SettingError("data.batch_size", per_device, f"{hint}{per_device * replicas}; set one of the two")
    with open_dict(data):
        data.batch_size, data.global_batch_size = total // replicas, total


def _settle_shards(data: DictConfig, replicas: int) -> None:
    if data.get("shards") and data.get("num_shards") is None:
        data.num_shards = replicas
    number = data.get("num_shards")
    shards.check(data.get("shards"), number)
    if number is not None and replicas % number:
        sizes = divisors(replicas)[1:]
        works = f"numbers that work: {', '.join(map(str, sizes))}"
        works = works if sizes else f"use {number} devices, or simulate={number}"
        hint = f"each of {replicas} devices has one shard, each shard equally many devices; {works}"
        raise SettingError("data.num_shards", number, hint)


def _settle_norm(norm: DictConfig, device_batch: int, replicas: int) -> None:
    if isinstance(norm.get("only"), str):
        norm.only = [norm.only]
    if norm.name == "ghost":
        with open_dict(norm):
            _check_ghost_batch(norm.batch_size, device_batch)
            norm.ghost_batch = norm.batch_size
    if norm.name == "sync":
        if norm.batch_size is not None:
            norm.group, norm.ghost_batch = _share(norm, device_batch, replicas)
        check_group("norm.group", norm.group, replicas)


def _check_ghost_batch(size: int, device_batch: int) -> None:
    sizes = divisors(device_batch)[:-1]
    if size in sizes:
        return
    hint = (
        "a device holds 1 sample, which cannot be cut into ghost batches; use a larger data.batch_size, or norm=local"
    )
    if sizes:
        hint = f"ghost batches are equal parts of the {device_batch} samples that a device holds (data.batch_size); "
        hint += f"sizes that work: {', '.join(map(str, sizes))}"
    raise SettingError("norm.batch_size", size, hint)


def _share(norm: DictConfig, device_batch: int, replicas: int) -> tuple[Any, Any]:
    """The group and the ghost batch that make ``norm.batch_size`` samples share statistics."""
    try:
        picked = batch_planning.normalization_batch(norm.batch_size, device_batch, replicas)
    except (TypeError, ValueError) as error:
        raise SettingError("norm.batch_size", norm.batch_size, str(error).removeprefix("batch_size=")) from None
    if (norm.group, norm.ghost_batch) not in (("world", None), picked):
        raise SettingError("norm.batch_size", norm.batch_size, "it sets group and ghost_batch: leave these out")
    return picked
