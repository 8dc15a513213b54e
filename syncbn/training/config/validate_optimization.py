"""Settles the learning rate, and checks settings of optimizer, schedule, averages and early stopping together."""

from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from syncbn.training.config.plan import Plan
from syncbn.training.errors import SettingError

# Settings of ``optimizer`` that are not arguments of its class.
OURS = ("lr_batch", "lr_given", "layer_decay", "lr_scale")


def settle_lr(cfg: DictConfig) -> None:
    """Scales ``optimizer.lr`` with the global batch (Goyal et al. 2017), if ``optimizer.lr_batch`` asks for it.

    The given value is kept as ``optimizer.lr_given``, so that settings that are settled already do not change.
    """
    optimizer = cfg.optimizer
    if optimizer.get("lr_batch") is None:
        return
    if "lr" not in optimizer:
        raise SettingError(
            "optimizer.lr_batch", optimizer.lr_batch, "the optimizer has no lr to scale; set optimizer.lr"
        )
    with open_dict(optimizer):
        optimizer.lr_given = optimizer.get("lr_given", optimizer.lr)
        optimizer.lr = optimizer.lr_given * samples_per_step(cfg) / optimizer.lr_batch


def samples_per_step(cfg: DictConfig) -> int:
    """Samples of an optimizer step over all devices, those of accumulated batches included."""
    return int(cfg.data.global_batch_size) * int(cfg.trainer.get("accumulate_grad_batches") or 1)


def separate(cfg: DictConfig) -> None:
    """Removes from ``module`` the optimizer's settings that are not arguments of its class; after interpolation."""
    for node in _nodes(cfg.module):
        if node.get("_target_") == cfg.optimizer.get("_target_"):
            with open_dict(node):
                for name in OURS:
                    node.pop(name, None)


def _nodes(node: Any) -> list[DictConfig]:
    if not isinstance(node, DictConfig):
        return []
    return [node, *(each for value in node.values() for each in _nodes(value))]


def check(plan: Plan) -> None:
    """Refuses settings that cannot be combined.

    Raises:
        SettingError: for the first setting that cannot work.
    """
    cfg = plan.cfg
    _check_rates(cfg)
    _check_scheduler(cfg)
    _check_averaging(cfg)
    _check_statistics_of_average(plan)
    _check_early_stopping(cfg)
    _check_find_lr(cfg)
    if cfg.trainer.get("gradient_clip_algorithm") and cfg.trainer.get("gradient_clip_val") is None:
        hint = "there is no clipping; set trainer.gradient_clip_val, or leave this out"
        raise SettingError("trainer.gradient_clip_algorithm", cfg.trainer.gradient_clip_algorithm, hint)


def _check_rates(cfg: DictConfig) -> None:
    for name in ("layer_decay", "lr_scale"):
        if cfg.optimizer.get(name) is not None and name not in cfg.module:
            target = cfg.module.get("_target_")
            hint = f"{target} does not take it; give its __init__ an argument {name}, and set module.{name}="
            raise SettingError(f"optimizer.{name}", cfg.optimizer[name], f"{hint}'${{optimizer.{name}}}'")


def _check_scheduler(cfg: DictConfig) -> None:
    scheduler, epochs = cfg.get("scheduler"), cfg.trainer.get("max_epochs")
    if not isinstance(scheduler, DictConfig) or not str(scheduler.get("_target_")).startswith("syncbn.training."):
        return  # arguments of another class may mean something else
    warmup, steps = scheduler.get("warmup_epochs") or 0, scheduler.get("warmup_steps") or 0
    if warmup and steps:
        hint = f"scheduler.warmup_epochs={warmup} sets the same; use one of the two"
        raise SettingError("scheduler.warmup_steps", steps, hint)
    end = scheduler.get("epochs") or epochs
    if warmup and end is not None and 0 < end <= warmup:
        raise SettingError("scheduler.warmup_epochs", warmup, f"training has {end} epochs; use fewer")
    if scheduler.get("warmup_lr") and cfg.optimizer.get("lr") and scheduler.warmup_lr > cfg.optimizer.lr:
        hint = f"it is above optimizer.lr={cfg.optimizer.lr}, to which the warm-up rises; use a smaller one"
        raise SettingError("scheduler.warmup_lr", scheduler.warmup_lr, hint)


def _check_averaging(cfg: DictConfig) -> None:
    averaging, epochs = cfg.averaging, cfg.trainer.get("max_epochs")
    if averaging.ema is not None and averaging.swa_from is not None:
        hint = f"averaging.swa_from={averaging.swa_from:g} is another average; use one of the two"
        raise SettingError("averaging.ema", averaging.ema, hint)
    needed = {"swa_lr": "swa_from", "bn_batches": "ema"}
    for name, by in needed.items():
        if averaging[name] is not None and averaging.ema is averaging.swa_from is None:
            raise SettingError(f"averaging.{name}", averaging[name], f"there is no average; set averaging.{by}")
    if averaging.swa_lr is not None and averaging.swa_from is None:
        raise SettingError("averaging.swa_lr", averaging.swa_lr, "it is for averaging.swa_from, which is null")
    if averaging.bn_batches and cfg.norm.name in ("none", "group_norm"):
        hint = f"norm={cfg.norm.name} leaves no batch norm to measure; use averaging.bn_batches=null"
        raise SettingError("averaging.bn_batches", averaging.bn_batches, hint)
    start, limited = averaging.swa_from, epochs is not None and epochs > 0
    if start is None:
        return
    if start < 1 and not limited:
        raise SettingError("averaging.swa_from", start, "a share needs trainer.max_epochs; use the number of an epoch")
    if start >= 1 and (start != int(start) or (limited and start > epochs)):
        wrong = "it is no whole number" if start != int(start) else f"training has {epochs} epochs"
        raise SettingError("averaging.swa_from", start, f"{wrong}; use an epoch from 1, or a share below 1")


def _check_statistics_of_average(plan: Plan) -> None:
    averaging, together = plan.cfg.averaging, plan.batches_at_once
    if averaging.ema is averaging.swa_from is None:
        return
    if (averaging.bn_batches or 0) % together:
        hint = f"simulate={plan.simulated} takes trainer.accumulate_grad_batches={together} batches at once; "
        raise SettingError("averaging.bn_batches", averaging.bn_batches, f"{hint}use a multiple of {together}")
    for name, node in (plan.cfg.callbacks or {}).items():
        target = node.get("_target_") if isinstance(node, DictConfig) else None
        if str(target).rpartition(".")[2] == "PreciseStatistics":
            hint = "it measures the raw weights, but the average is validated and saved; drop it, and use "
            raise SettingError(f"callbacks.{name}", target, f"{hint}averaging.bn_batches=20")


def _check_early_stopping(cfg: DictConfig) -> None:
    stopping = cfg.early_stopping
    if stopping.patience is None:
        for name, default in (("min_delta", 0.0), ("mode", None)):
            if stopping[name] != default:
                hint = "training is not stopped early; set early_stopping.patience too"
                raise SettingError(f"early_stopping.{name}", stopping[name], hint)
    elif OmegaConf.select(cfg, "callbacks.checkpoint.monitor") is None:
        hint = "there is no metric to watch; set callbacks.checkpoint.monitor"
        raise SettingError("early_stopping.patience", stopping.patience, hint)
    elif cfg.averaging.swa_from is not None:
        hint = f"it may end training before the epochs that averaging.swa_from={cfg.averaging.swa_from:g} averages; "
        raise SettingError("early_stopping.patience", stopping.patience, f"{hint}use one of the two")


def _check_find_lr(cfg: DictConfig) -> None:
    if cfg.mode != "find_lr":
        return
    if cfg.find_lr.max <= cfg.find_lr.min:
        hint = f"it has to be above find_lr.min={cfg.find_lr.min}"
        raise SettingError("find_lr.max", cfg.find_lr.max, hint)
    if cfg.ckpt_path is not None and cfg.ckpt_restore != "weights":
        hint = "a search begins with the weights of a checkpoint, and not in its training; use ckpt_restore=weights"
        raise SettingError("ckpt_restore", cfg.ckpt_restore, hint)
