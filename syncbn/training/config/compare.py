"""Compares the settings of two runs: which differences matter when a run continues."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from syncbn.training.config.schema import Config

# What may differ between two attempts of one run without a word: where and how, but not what is trained.
HARMLESS = [
    "run",
    "ckpt_path",
    "trust",
    "ckpt_restore",
    "resume",
    "timeouts",
    "cluster",
    "logger",
    "data.num_workers",
    *(f"ddp.{name}" for name in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "bucket_cap_mb")),
    "callbacks.checkpoint.dirpath",
]
# Of callbacks those that look; others may change the weights.
HARMLESS += [f"callbacks.{name}" for name in ("learning_rate", "statistics", "finite._target_", "finite.every_n_steps")]
HARMLESS += [f"trainer.{name}" for name in ("log_every_n_steps", "profiler", "enable_progress_bar")]
# And what a finished run may be asked for again with, or go on with, that it did not begin with.
DONE = [*HARMLESS, "scheduler.epochs", "callbacks.checkpoint", "data.batch_size"]
DONE += [f"trainer.{name}" for name in ("max_epochs", "devices", "num_nodes", "accelerator")]
# And with what it may go on alone: where nothing is left to train, it would not have been done.
FREE = [*DONE, "callbacks.finite", "callbacks.gradients"]
COPIES = ["module.network", "module.optimizer", "module.scheduler"]  # of groups that are compared themselves


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"data": {"batch_size": 2}}`` as ``{"data.batch_size": 2}``."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {name: value for key, each in tree.items() for name, value in flat(each, f"{prefix}{key}.").items()}


# What a setting was before there was one of that name; in a group's file it is null, if not said here.
DEFAULTS = flat(OmegaConf.to_container(OmegaConf.structured(Config)))
DEFAULTS |= {"model.activation": "relu", "model.init": "he", "model.gain": 1.0}
DEFAULTS |= {"callbacks.finite.action": "fail"}


def changes_of(cfg: DictConfig, earlier: DictConfig, free: Sequence[str]) -> list[str]:
    """Settings that are not as before, each as ``name=before -> now``, but those in ``free`` and what is in them.

    A setting that one of the two does not have yet has its default there.
    """
    # Both are settled. An interpolation in a config.yaml is not ours, and would show what is in the environment.
    before, now = (DEFAULTS | flat(OmegaConf.to_container(each)) for each in (earlier, cfg))
    skipped = tuple(f"{name}." for name in (*free, *COPIES))
    names = [name for name in sorted(before.keys() | now.keys()) if not f"{name}.".startswith(skipped)]
    return [f"{name}={before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
