"""Checks combinations of settings, and settings that depend on the number of devices. ``ranges`` checks single ones."""

import re
from typing import Any

from omegaconf import DictConfig

from syncbn.nn.comm import groups
from syncbn.training import program
from syncbn.training.config import run_id, validate_data, validate_evaluation, validate_optimization
from syncbn.training.config.plan import Plan
from syncbn.training.errors import SettingError

FOLLOWS = ("plugins", "logger", "callbacks", "default_root_dir")  # arguments of Lightning's Trainer that syncbn sets


def check(plan: Plan) -> None:
    """Refuses settings that cannot be combined.

    Raises:
        SettingError: for the first setting that cannot work.
    """
    _check_simulated(plan)
    _check_ddp(plan)
    _check_torch_sync(plan)
    _check_precision(plan)
    validate_data.check(plan.cfg)
    _check_simulated_batches(plan)
    validate_evaluation.check(plan)
    validate_optimization.check(plan)
    if plan.cfg.get("adapt") is not None:
        check_group("adapt.group", plan.cfg.adapt.get("group", "world"), plan.world_size)
    run_id.check_id(plan.cfg.run.id)
    if plan.restore is not None and plan.checkpoint is None:
        raise SettingError("ckpt_restore", plan.restore, "there is nothing to restore; set ckpt_path too")


def check_trainer(cfg: DictConfig) -> None:
    """Refuses arguments of Lightning's Trainer that another setting of this program replaces.

    Raises:
        SettingError: the hint names that other setting.
    """
    trainer = cfg.trainer
    if trainer.get("sync_batchnorm"):
        raise SettingError("trainer.sync_batchnorm", True, "drop it; norm=sync synchronizes, on the CPU too")
    if "strategy" in trainer:
        raise SettingError("trainer.strategy", trainer.strategy, _instead_of_strategy(trainer.strategy))
    for name in FOLLOWS:
        if name in trainer:
            hint = "drop it; it follows from norm, logger, callbacks and the run directory"
            raise SettingError(f"trainer.{name}", hint=hint)
    if trainer.get("fast_dev_run"):  # Lightning turns off checkpoints and loggers for it, which the test needs
        raise SettingError("trainer.fast_dev_run", trainer.fast_dev_run, "use debug=fast")
    batches = trainer.get("overfit_batches")
    if batches:  # Lightning 2.6 replaces the loaders' samplers for it, which would remove ours
        hint = f"use debug=overfit trainer.limit_train_batches={batches}"
        raise SettingError("trainer.overfit_batches", batches, hint)


def check_group(setting: str, group: Any, world_size: int) -> None:
    """Refuses a group that is not a valid group of the layer, or whose size does not divide the world size.

    Raises:
        SettingError: the hint names the groups that work.
    """
    try:
        spec = groups.parse(group)
        if isinstance(spec, int):
            groups.check_divides(spec, world_size)
    except (TypeError, ValueError) as error:  # its message begins with the setting: group=3 does not divide ...
        raise SettingError(setting, group, re.sub(r'^group=("[^"]*"|\S+?):? ', "", str(error))) from None


def divisors(number: int) -> list[int]:
    """All divisors of a number, in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _instead_of_strategy(strategy: Any) -> str:
    found = re.search(r"find_unused_parameters['\"_:= ]+(true|false)", str(strategy), re.IGNORECASE)
    if found:
        return f"use ddp.find_unused_parameters={found[1].lower()}"
    return (
        "drop it; the ranks use DistributedDataParallel, whose settings are ddp.find_unused_parameters and others "
        f"({program.name()} --cfg job --package ddp)"
    )


def _check_ddp(plan: Plan) -> None:
    ddp = plan.cfg.ddp
    if ddp.static_graph and ddp.find_unused_parameters:
        hint = "it finds unused parameters itself, once; use ddp.find_unused_parameters=false"
        raise SettingError("ddp.static_graph", True, hint)
    batches = plan.cfg.trainer.get("accumulate_grad_batches") or 1
    # DDP with static_graph fails if no_sync() is used before the first all-reduce, as gradient accumulation does.
    if ddp.static_graph and batches != 1 and not plan.simulated:
        hint = f"with trainer.accumulate_grad_batches={batches} torch's DistributedDataParallel fails; use "
        hint += "ddp.static_graph=false, or trainer.accumulate_grad_batches=1"
        raise SettingError("ddp.static_graph", True, hint)
    for name in ("comm_hook", "comm_wrapper"):
        if ddp[name] == "bf16" and plan.accelerator == "cpu":
            raise SettingError(f"ddp.{name}", "bf16", f"torch has it for GPUs only; use ddp.{name}=fp16 or null")
    if ddp.comm_wrapper is not None and ddp.comm_hook != "powersgd":
        hook = "null" if ddp.comm_hook is None else ddp.comm_hook
        hint = f"it wraps ddp.comm_hook=powersgd, but that is {hook}; "
        hint += f"use ddp.comm_hook={ddp.comm_wrapper} alone, or powersgd"
        raise SettingError("ddp.comm_wrapper", ddp.comm_wrapper, hint)
    if plan.simulated and ddp.comm_hook is not None:
        hint = f"it compresses what processes send, and with simulate={plan.simulated} one process sends nothing; "
        raise SettingError("ddp.comm_hook", ddp.comm_hook, f"{hint}use ddp.comm_hook=null")


def _check_simulated(plan: Plan) -> None:
    if plan.simulated is None:
        return
    if plan.world_size != 1:
        hint = f"one process represents all devices, but trainer.devices={plan.devices} and "
        hint += f"trainer.num_nodes={plan.num_nodes}; leave these out, or simulate"
        raise SettingError("simulate", plan.simulated, hint)
    if plan.cfg.data.get("remainder") == "uneven":
        hint = "simulated devices hold equally many samples; use data.remainder=drop or pad instead of uneven"
        raise SettingError("simulate", plan.simulated, hint)


def _check_simulated_batches(plan: Plan) -> None:
    """Refuses sizes with which one process could not split a batch at the same places as the simulated devices."""
    if plan.simulated is None:
        return
    ghost, size, together = plan.cfg.norm.get("ghost_batch"), plan.batch_size, plan.batches_at_once
    if ghost is not None and size % ghost:
        hint = (
            f"with simulate={plan.simulated} ghost batches are equal parts of the {size} samples that a device holds "
        )
        hint += f"(data.batch_size); sizes that work: {', '.join(map(str, divisors(size)))}"
        raise SettingError("norm.ghost_batch", ghost, hint)
    if together == 1:
        return
    at_once = f"simulate={plan.simulated} takes trainer.accumulate_grad_batches={together} batches at once"
    if plan.cfg.precise_batches % together:
        raise SettingError("precise_batches", plan.cfg.precise_batches, f"{at_once}; use a multiple of {together}")
    every = plan.cfg.trainer.get("val_check_interval")
    if every is not None and (isinstance(every, int) or every != 1.0):
        raise SettingError("trainer.val_check_interval", every, f"{at_once}; use 1.0, a validation an epoch")


def _check_precision(plan: Plan) -> None:
    precision = str(plan.cfg.trainer.get("precision") or "32-true")
    if plan.accelerator == "cpu" and precision.startswith("16"):
        hint = "float16 needs a GPU; on the CPU use 32-true, bf16-mixed or 64-true"
        raise SettingError("trainer.precision", precision, hint)


def _check_torch_sync(plan: Plan) -> None:
    if plan.cfg.norm.name != "torch_sync":
        return
    if plan.accelerator == "cpu":
        raise SettingError("norm", "torch_sync", "torch.nn.SyncBatchNorm does not run on the CPU; use norm=sync")
    if plan.simulated:
        raise SettingError("simulate", plan.simulated, "torch.nn.SyncBatchNorm wants real devices; use norm=sync")
