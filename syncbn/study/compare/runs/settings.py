"""Flattens the settings of a run that can change its result; those of hardware and processes are separate."""

from collections.abc import Mapping, Sequence
from typing import Any

from syncbn.study.compare.runs import labels
from syncbn.study.compare.runs.run_reader import Run
from syncbn.training.config.compare import COPIES, DEFAULTS, RENAMED, flat

# Groups and names of settings that cannot change the trained network: output, cluster, logging, evaluation.
BOOKKEEPING = [
    *("run", "resume", "timeouts", "cluster", "logger", "study", "ckpt_path"),
    *("ckpt_restore", "trust", "plots", "metrics", "test", "precise_batches"),
    *("corruptions", "fit", "target", "find_lr"),
    *("callbacks.learning_rate", "callbacks.finite", "callbacks.statistics", "callbacks.gradients"),
    "callbacks.leak",
    *("callbacks.checkpoint.dirpath", "callbacks.checkpoint.filename", "data.num_workers", "data.num_shards"),
    *("trainer.log_every_n_steps", "trainer.profiler", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
]
PLACE = ("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "simulate")  # see `how` and `devices`
# Settings whose default is the value of another setting. They are dropped if they have that value.
FOLLOWS = {
    "data.seed": "seed",
    "scheduler.epochs": "trainer.max_epochs",
    "module.num_classes": "model.num_classes",
}
LATER = ("averaging.", "early_stopping.", "scheduler.")  # groups with settings that older runs lack


def settings(run: Run) -> dict[str, Any]:
    """The settings that can change the result, without the seed; empty if they are unreadable. null counts as unset.

    ``devices`` is the total number of devices: processes on one or several nodes, or one process that simulates them.
    With ``norm.batch_size``, the group and the ghost batch that it selects are dropped. ``ckpt_path`` is the checkpoint
    that the user named, not the one from which a later attempt resumed. Runs that only test have no ``ckpt_path``.
    """
    if not run.config:
        return {}
    every = flat(run.config)
    skipped = (*BOOKKEEPING, *PLACE, *COPIES)
    kept = {name: value for name, value in every.items() if not labels.is_in(name, skipped)}
    for name, origin in FOLLOWS.items():
        if kept.get(name) == every.get(origin):
            kept.pop(name, None)
    for name in [name for name in kept if name.startswith(LATER) and kept[name] == DEFAULTS.get(name)]:
        kept.pop(name)
    if (target := RENAMED.get(str(kept.get("scheduler._target_")))) is not None:
        kept["scheduler._target_"] = target
    kept.pop("seed", None)
    if kept.get("norm.batch_size") is not None:
        kept.pop("norm.group", None)
        kept.pop("norm.ghost_batch", None)
    kept["devices"] = devices(run)
    if kept.get("mode") == "train":  # older runs have no mode
        kept.pop("mode")
    # A run that only tests has a different checkpoint for each seed.
    if run.about.get("begun_from") and not run.about.get("tests"):
        kept["ckpt_path"] = run.about["begun_from"]
    # Lists become strings, so that values are hashable.
    kept = {name: value for name, value in kept.items() if value is not None}
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in kept.items()}


def implied(factor: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    """Which of device batch, global batch and number of devices to drop: two of them determine the third."""
    device_batch, global_batch = "data.batch_size", "data.global_batch_size"
    if global_batch in factor:
        return device_batch
    global_batch_is_kept = len({each.get(global_batch) for each in runs}) == 1
    others = {"devices": device_batch, device_batch: "devices"}
    return next((others[name] for name in factor if name in others and global_batch_is_kept), global_batch)


def devices(run: Run) -> int:
    """The number of devices, real or simulated; 0 if the settings are unreadable."""
    trainer = run.config.get("trainer") or {}
    numbers = run.config.get("simulate"), trainer.get("devices"), trainer.get("num_nodes", 1)
    simulated, per_node, nodes = (number if isinstance(number, int) else 0 for number in numbers)
    return simulated or per_node * nodes


def is_simulated(run: Run) -> bool:
    """Whether one process simulated several devices."""
    return bool(run.config.get("simulate"))


def is_on_gpu(run: Run) -> bool:
    """Whether the devices are GPUs."""
    return bool((run.config.get("trainer") or {}).get("accelerator") == "gpu")


def place(run: Run) -> str:
    """The type of processes and devices, without their number. Runs of different places are never paired."""
    if not run.config:
        return ""
    if is_simulated(run):
        return f"one process on {'a GPU' if is_on_gpu(run) else 'the CPU'}"
    return f"processes on {'GPUs' if is_on_gpu(run) else 'the CPU'}"


def how(run: Run) -> str:
    """The place with numbers, for display: "2 processes on the CPU", "1 process for 2 devices"."""
    if not run.config:
        return ""
    number, on_gpu = devices(run), is_on_gpu(run)
    if is_simulated(run):
        return f"1 process for {number} device{'s' * (number != 1)}{' on a GPU' * on_gpu}"
    nodes = run.config["trainer"].get("num_nodes", 1)
    across = f" of {nodes} nodes" if isinstance(nodes, int) and nodes > 1 else ""
    return f"{number} process{'es' * (number != 1)} on {'GPUs' if on_gpu else 'the CPU'}{across}"
