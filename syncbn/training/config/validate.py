"""Settings: one check of all of them before any work, and what follows from them."""

import os
import re
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from syncbn.nn import batch_planning
from syncbn.nn.comm import groups
from syncbn.training.config import run_id, validate_evaluation
from syncbn.training.config.derived import devices, in_one, world_size
from syncbn.training.data import shards
from syncbn.training.distributed import environment, slurm
from syncbn.training.errors import SettingError

NORMS = ("sync", "local", "local_mean", "ghost", "none", "group_norm", "torch_sync")
NEEDED = {
    "sync": ("group", "batch_size", "ghost_batch"),
    "ghost": ("batch_size",),
    "group_norm": ("num_groups", "min_channels"),
}
DEFAULT_BATCH_SIZE = 32
RUN_ID = run_id.RUN_ID
LONGEST_TIMEOUT = 2_000_000  # seconds, 23 days; torch counts milliseconds in 32 bits
LARGEST_BUCKET = 1_000_000  # MiB; torch counts bytes in 64 bits


def settle(cfg: DictConfig) -> None:
    """Checks every setting and puts numbers where the user left a choice, in place.

    Afterwards interpolations are resolved, ``trainer.accelerator`` and ``trainer.devices`` are what will be used, and
    ``data.batch_size`` (per device) and ``data.global_batch_size`` both stand.

    Raises:
        SettingError: at the first setting that cannot work.
    """
    if cfg.get("simulate") is not None and cfg.trainer.devices == "auto":
        cfg.trainer.devices = 1
    _settle_devices(cfg.trainer)
    if cfg.cluster.name == "slurm" and environment.launcher() != "srun":
        raise SettingError(
            "cluster=slurm: srun did not start this process; use sbatch slurm/train.sbatch, or cluster=local"
        )
    _check_trainer(cfg.trainer)
    _check_simulated(cfg)
    _check_ddp(cfg)
    _settle_batch_size(cfg.data, devices(cfg))
    _settle_shards(cfg.data, devices(cfg))
    _settle_norm(cfg.norm, cfg.data.batch_size, devices(cfg))
    _check_torch_sync(cfg)
    _check_simulated_batches(cfg)
    for name in ("lr", "momentum", "weight_decay"):
        _check_number(f"optimizer.{name}", cfg.optimizer.get(name, 0.0))
    if not 0 <= cfg.seed < 2**32:
        raise SettingError(f"seed={cfg.seed}: use a number from 0 to {2**32 - 1}")
    validate_evaluation.check(cfg, world_size(cfg))
    _check_resume(cfg)
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise SettingError(" ".join(str(error).split())) from error


def _settle_devices(trainer: DictConfig) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if trainer.accelerator == "auto":
        trainer.accelerator = "gpu" if gpus else "cpu"
    if trainer.accelerator == "cuda":
        trainer.accelerator = "gpu"
    if trainer.accelerator not in ("cpu", "gpu"):
        raise SettingError(f"trainer.accelerator={trainer.accelerator}: use auto, cpu or gpu")
    _take_launched(trainer, gpus)
    if trainer.num_nodes == "auto":
        trainer.num_nodes = 1
    if trainer.accelerator == "gpu" and not gpus:
        raise SettingError("trainer.accelerator=gpu: torch sees no GPU here; use trainer.accelerator=cpu (or auto)")
    if trainer.devices == "auto":
        trainer.devices = gpus if trainer.accelerator == "gpu" else 2
    for name in ("devices", "num_nodes"):
        _check_count(f"trainer.{name}", trainer[name])
    if trainer.accelerator == "gpu" and trainer.devices > gpus:
        per_node = f"#SBATCH --gpus-per-node={trainer.devices}, which each task sees all of"
        works = per_node if environment.launcher() == "srun" else f"use at most {gpus}"
        raise SettingError(f"trainer.devices={trainer.devices}: there are {gpus} GPUs; {works}")
    cores = os.cpu_count() or 1
    # A device on the CPU is a process: more of them than cores is slow, many more is a mistake.
    most = max(4 * cores, 8)
    if trainer.accelerator == "cpu" and trainer.devices > most:
        raise SettingError(
            f"trainer.devices={trainer.devices}: {trainer.devices} processes on {cores} CPU cores; use at most {most}"
        )


def _take_launched(trainer: DictConfig, gpus: int) -> None:
    """Takes the numbers of nodes and devices from torchrun or srun, where one of them started this process."""
    slurm.check()
    by = environment.launcher()
    if by is None:
        return
    if by == "srun":
        slurm.join()
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    found = {"num_nodes": int(os.environ["WORLD_SIZE"]) // per_node, "devices": per_node}
    if by == "srun" and trainer.devices == "auto" and trainer.accelerator == "gpu" and per_node < gpus:
        raise SettingError(
            f"Slurm: {gpus} GPUs, but {per_node} tasks on this node; ask for {slurm.header(found['num_nodes'], gpus)}, "
            f"or say trainer.devices={per_node}"
        )
    for name, number in found.items():
        if trainer[name] not in ("auto", number):
            wanted = {key: trainer[key] if trainer[key] != "auto" else found[key] for key in found}
            works = f"ask for {slurm.header(wanted['num_nodes'], wanted['devices'])}"
            raise SettingError(
                f"trainer.{name}={trainer[name]}: {by} started {number}; leave it out, or "
                f"{works if by == 'srun' else 'make them agree'}"
            )
        trainer[name] = number


def _check_trainer(trainer: DictConfig) -> None:
    if trainer.get("sync_batchnorm"):
        raise SettingError("trainer.sync_batchnorm=true: drop it; norm=sync synchronizes, on the CPU too")
    if "strategy" in trainer:
        raise SettingError(_advice_for_strategy(trainer.strategy))
    for name in ("plugins", "logger", "callbacks", "default_root_dir"):
        if name in trainer:
            raise SettingError(
                f"trainer.{name}: drop it; it follows from norm, logger, callbacks and the run directory"
            )
    batches = trainer.get("overfit_batches")
    if batches:  # Lightning puts samplers of its own into the loaders for it, and ours do not work with them
        raise SettingError(
            f"trainer.overfit_batches={batches}: use debug=overfit trainer.limit_train_batches={batches}"
        )
    if trainer.get("max_epochs") is not None and trainer.max_epochs != -1:
        _check_count("trainer.max_epochs", trainer.max_epochs)


def _advice_for_strategy(strategy: Any) -> str:
    found = re.search(r"find_unused_parameters['\"_:= ]+(true|false)", str(strategy), re.IGNORECASE)
    if found:
        return f"trainer.strategy={strategy}: use ddp.find_unused_parameters={found[1].lower()}"
    return (
        f"trainer.strategy={strategy}: drop it; the ranks use DistributedDataParallel, whose settings are "
        "ddp.find_unused_parameters and others (python train.py --cfg job --package ddp)"
    )


def _check_ddp(cfg: DictConfig) -> None:
    ddp = cfg.ddp
    if ddp.static_graph and ddp.find_unused_parameters:
        raise SettingError(
            "ddp.static_graph=true: it finds unused parameters itself, once; use ddp.find_unused_parameters=false"
        )
    batches = cfg.trainer.get("accumulate_grad_batches") or 1
    if ddp.static_graph and batches != 1 and not cfg.get("simulate"):  # DDP's no_sync() before its first all-reduce
        raise SettingError(
            f"ddp.static_graph=true: with trainer.accumulate_grad_batches={batches} torch's DistributedDataParallel "
            "fails; use ddp.static_graph=false, or trainer.accumulate_grad_batches=1"
        )
    for name in ("comm_hook", "comm_wrapper"):
        if ddp[name] == "bf16" and cfg.trainer.accelerator == "cpu":
            raise SettingError(f"ddp.{name}=bf16: torch has it for GPUs only; use ddp.{name}=fp16 or null")
    if ddp.bucket_cap_mb is not None and not 0 < ddp.bucket_cap_mb <= LARGEST_BUCKET:
        raise SettingError(
            f"ddp.bucket_cap_mb={ddp.bucket_cap_mb}: use a number above 0 and up to {LARGEST_BUCKET}, in MiB, or null"
        )
    for name, words in (("comm_hook", ("fp16", "bf16", "powersgd")), ("comm_wrapper", ("fp16", "bf16"))):
        if ddp[name] not in (None, *words):
            raise SettingError(f"ddp.{name}={ddp[name]}: use null, {', '.join(words[:-1])} or {words[-1]}")
    if ddp.comm_wrapper is not None and ddp.comm_hook != "powersgd":
        hook = "null" if ddp.comm_hook is None else ddp.comm_hook
        raise SettingError(
            f"ddp.comm_wrapper={ddp.comm_wrapper}: it wraps ddp.comm_hook=powersgd, but that is {hook}; use "
            f"ddp.comm_hook={ddp.comm_wrapper} alone, or powersgd"
        )
    _check_count("ddp.powersgd_rank", ddp.powersgd_rank)
    if ddp.powersgd_start < 2:
        raise SettingError(
            f"ddp.powersgd_start={ddp.powersgd_start}: use 2 or more, since DDP changes its buckets before that"
        )
    if cfg.get("simulate") and ddp.comm_hook is not None:
        raise SettingError(
            f"ddp.comm_hook={ddp.comm_hook}: it compresses what processes send, and with simulate={cfg.simulate} one "
            "process sends nothing; use ddp.comm_hook=null"
        )


def _check_simulated(cfg: DictConfig) -> None:
    if cfg.get("simulate") is None:
        return
    _check_count("simulate", cfg.simulate)
    if world_size(cfg) != 1:
        raise SettingError(
            f"simulate={cfg.simulate}: one process stands for the devices, but trainer.devices={cfg.trainer.devices} "
            f"and trainer.num_nodes={cfg.trainer.num_nodes}; leave these out, or simulate"
        )
    if cfg.data.get("remainder") == "uneven":
        raise SettingError(
            f"simulate={cfg.simulate}: devices that are simulated hold equally many samples; use data.remainder=drop "
            "or pad instead of uneven"
        )


def _check_simulated_batches(cfg: DictConfig) -> None:
    """What one process takes at once is to be cut where devices would cut it."""
    if cfg.get("simulate") is None:
        return
    ghost, size, together = cfg.norm.get("ghost_batch"), cfg.data.batch_size, in_one(cfg)
    if ghost is not None and size % ghost:
        raise SettingError(
            f"norm.ghost_batch={ghost}: with simulate={cfg.simulate} ghost batches are equal parts of the {size} "
            f"samples that a device holds (data.batch_size); sizes that work: {_listed(_divisors(size))}"
        )
    if together == 1:
        return
    at_once = f"simulate={cfg.simulate} takes trainer.accumulate_grad_batches={together} batches at once"
    if cfg.precise_batches % together:
        raise SettingError(f"precise_batches={cfg.precise_batches}: {at_once}; use a multiple of {together}")
    every = cfg.trainer.get("val_check_interval")
    if every is not None and (isinstance(every, int) or every != 1.0):
        raise SettingError(f"trainer.val_check_interval={every}: {at_once}; use 1.0, a validation an epoch")


def _check_resume(cfg: DictConfig) -> None:
    run_id.check_id(cfg.run.id)
    if cfg.get("ckpt_restore") not in (None, "all", "weights"):
        raise SettingError(f"ckpt_restore={cfg.ckpt_restore}: use all, weights or null")
    if cfg.get("ckpt_restore") is not None and cfg.ckpt_path is None:
        raise SettingError(f"ckpt_restore={cfg.ckpt_restore}: there is nothing to restore; give ckpt_path too")
    if cfg.resume.every_n_steps is not None:
        _check_count("resume.every_n_steps", cfg.resume.every_n_steps)
    _check_count("resume.keep", cfg.resume.keep)
    for name in ("resume.every_n_minutes", "timeouts.collective", "timeouts.stop"):
        value = OmegaConf.select(cfg, name)
        if value is not None and not value > 0:
            raise SettingError(f"{name}={value}: use a number above 0")
        if value is not None and name.startswith("timeouts.") and value > LONGEST_TIMEOUT:
            raise SettingError(f"{name}={value}: use at most {LONGEST_TIMEOUT} seconds")


def _settle_batch_size(data: DictConfig, ranks: int) -> None:
    for name in ("batch_size", "global_batch_size"):
        if data.get(name) is not None:
            _check_count(f"data.{name}", data[name])
    per_device, total = data.get("batch_size"), data.get("global_batch_size")
    if total is None:
        per_device = DEFAULT_BATCH_SIZE if per_device is None else per_device
        total = per_device * ranks
    elif total % ranks:
        near = [n for n in (total // ranks * ranks, (total // ranks + 1) * ranks) if n]
        raise SettingError(
            f"data.global_batch_size={total}: {ranks} devices cannot share it equally; use a multiple of {ranks}, "
            f"such as {' or '.join(map(str, near))}"
        )
    elif per_device is not None and per_device * ranks != total:
        raise SettingError(
            f"data.batch_size={per_device} and data.global_batch_size={total} disagree: "
            f"{per_device} on each of {ranks} devices make {per_device * ranks}; give one of the two"
        )
    with open_dict(data):
        data.batch_size, data.global_batch_size = total // ranks, total


def _settle_shards(data: DictConfig, ranks: int) -> None:
    if data.get("shards") and data.get("num_shards") is None:
        data.num_shards = ranks
    number = data.get("num_shards")
    shards.check(data.get("shards"), number)
    if number is not None and ranks % number:
        sizes = _divisors(ranks)[1:]
        works = f"numbers that work: {_listed(sizes)}" if sizes else f"use {number} devices, or simulate={number}"
        raise SettingError(
            f"data.num_shards={number}: each of {ranks} devices has one shard, each shard equally many devices; {works}"
        )


def _settle_norm(norm: DictConfig, device_batch: int, ranks: int) -> None:
    if norm.name not in NORMS:
        raise SettingError(f"norm.name={norm.name}: use one of {', '.join(NORMS)}")
    for name in NEEDED.get(norm.name, ()):
        if name not in norm:  # settings of another run, for example
            raise SettingError(f"norm.{name}: norm.name={norm.name} needs it, and it is missing")
    if norm.name == "group_norm":
        for name in ("num_groups", "min_channels"):
            _check_count(f"norm.{name}", norm[name])
    if norm.name == "ghost":
        _settle_ghost(norm, device_batch)
    if norm.get("only") is not None and isinstance(norm.only, str):
        norm.only = [norm.only]
    if norm.name != "sync":
        return
    for name in ("batch_size", "ghost_batch"):
        if norm[name] is not None:
            _check_count(f"norm.{name}", norm[name])
    try:
        if norm.batch_size is not None:
            asked = (norm.group, norm.ghost_batch)
            picked = batch_planning.normalization_batch(norm.batch_size, device_batch, ranks)
            if asked not in (("world", None), picked):
                raise ValueError(f"batch_size={norm.batch_size} picks group and ghost_batch itself: leave them out")
            norm.group, norm.ghost_batch = picked
        spec = groups.parse(norm.group)
        if isinstance(spec, int):
            groups.check_divides(spec, ranks)
    except (TypeError, ValueError) as error:
        raise SettingError(f"norm.{error}") from None


def _settle_ghost(norm: DictConfig, device_batch: int) -> None:
    _check_count("norm.batch_size", norm.batch_size)
    sizes = _divisors(device_batch)[:-1]
    if not sizes:
        raise SettingError(
            f"norm.batch_size={norm.batch_size}: a device holds 1 sample, which cannot be cut into ghost batches; use "
            "a larger data.batch_size, or norm=local"
        )
    if norm.batch_size not in sizes:
        raise SettingError(
            f"norm.batch_size={norm.batch_size}: ghost batches are equal parts of the {device_batch} samples that a "
            f"device holds (data.batch_size); sizes that work: {_listed(sizes)}"
        )
    with open_dict(norm):
        norm.ghost_batch = norm.batch_size


def _check_torch_sync(cfg: DictConfig) -> None:
    if cfg.norm.name != "torch_sync":
        return
    if cfg.trainer.accelerator == "cpu":
        raise SettingError("norm=torch_sync: torch.nn.SyncBatchNorm does not run on the CPU; use norm=sync")
    if cfg.get("simulate"):
        raise SettingError(f"simulate={cfg.simulate}: torch.nn.SyncBatchNorm wants real devices; use norm=sync")


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingError(f"{name}={value}: use a whole number, 1 or more")


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
        raise SettingError(f"{name}={value}: use a number, 0 or more")
