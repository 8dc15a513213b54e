"""Compares the settings of two attempts or runs, and lists the settings that may differ when a run is resumed."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from syncbn.training.config.schema import Config

# Settings that may differ between two attempts of a run without a report: they do not affect the result.
HARMLESS = [
    "run",
    "ckpt_path",
    "checkpoint_activations",
    "plots",
    "trust",
    "ckpt_restore",
    "resume",
    "timeouts",
    "cluster",
    "logger",
    "objective",
    *(f"data.{name}" for name in ("num_workers", "prefetch_factor", "pin_memory", "persistent_workers")),
    *("data.cache", "data.cache_dir"),
    *("data.num_classes", "data.in_channels"),  # facts of the data, which model repeats
    *(f"ddp.{name}" for name in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "bucket_cap_mb")),
    "callbacks.checkpoint.dirpath",
]
# Callbacks that only measure. Other callbacks may change the weights.
HARMLESS += [f"callbacks.{name}" for name in ("learning_rate", "statistics", "finite._target_", "finite.every_n_steps")]
HARMLESS += [f"trainer.{name}" for name in ("log_every_n_steps", "profiler", "enable_progress_bar")]
# Settings that may also differ when the command of a finished run is repeated, or the run is resumed.
DONE = [*HARMLESS, "scheduler.epochs", "callbacks.checkpoint", "data.batch_size"]
DONE += [f"trainer.{name}" for name in ("max_epochs", "devices", "num_nodes", "accelerator")]
# Settings that may also differ when a run is resumed. A finished run refuses them: nothing is left that they apply to.
FREE = [*DONE, "callbacks.finite", "callbacks.gradients", "callbacks.leak", "metrics"]
# Copies of groups, which are compared themselves.
COPIES = [f"module.{name}" for name in ("network", "optimizer", "scheduler", "layer_decay", "lr_scale")]
COPIES += ["data.augment", "data.mix"]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings: ``{"data": {"batch_size": 2}}`` is ``{"data.batch_size": 2}``."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {name: value for key, each in tree.items() for name, value in flat(each, f"{prefix}{key}.").items()}


# The values of settings that a config.yaml of an earlier version lacks. A setting of a group that is not here was null.
DEFAULTS = flat(OmegaConf.to_container(OmegaConf.structured(Config)))
DEFAULTS |= {"model.activation": "relu", "model.init": "he", "model.gain": 1.0}
DEFAULTS |= {"callbacks.finite.action": "fail", "data.balance": False}
DEFAULTS |= {"scheduler.interval": "epoch", "scheduler.warmup_epochs": 0, "scheduler.warmup_steps": 0}
DEFAULTS |= {"scheduler.warmup_lr": 0.0}
# The class of a schedule in an earlier version, by the one that computes the same now.
RENAMED = {"torch.optim.lr_scheduler.MultiStepLR": "syncbn.training.Steps"}


def changes_of(cfg: DictConfig, earlier: DictConfig, free: Sequence[str]) -> list[str]:
    """Lists the changed settings, each as ``name=before -> now``.

    Both settings are settled. A setting that one of the two lacks has its default there. Settings and groups named in
    ``free`` are not compared.
    """
    # Interpolations are not resolved. Settled settings have none, and one that somebody wrote into a config.yaml could
    # print environment variables.
    before, now = (DEFAULTS | flat(OmegaConf.to_container(each)) for each in (earlier, cfg))
    for settings in (before, now):
        if (now_named := RENAMED.get(str(settings.get("scheduler._target_")))) is not None:
            settings["scheduler._target_"] = now_named
    skipped = tuple(f"{name}." for name in (*free, *COPIES))
    names = [name for name in sorted(before.keys() | now.keys()) if not f"{name}.".startswith(skipped)]
    return [f"{name}={before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
