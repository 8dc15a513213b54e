"""The settings of a run that can change what comes out of it, by flat names; where and how it ran is apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from syncbn.study.compare.runs.run_reader import Run
from syncbn.training.config.compare import COPIES, flat

# Bookkeeping, a group or a name each: where, how, and what is looked at. It cannot change what is trained.
BOOKKEEPING = [
    *("run", "resume", "timeouts", "cluster", "logger", "study", "ckpt_path"),
    *("ckpt_restore", "trust", "test", "precise_batches"),
    *("corruptions", "fit", "target"),
    *("callbacks.learning_rate", "callbacks.finite", "callbacks.statistics", "callbacks.gradients"),
    *("callbacks.checkpoint.dirpath", "callbacks.checkpoint.filename", "data.num_workers", "data.num_shards"),
    *("trainer.log_every_n_steps", "trainer.profiler", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
]
GPU = ("GPU", "GPUs")  # how the name of a place with GPUs ends
PLACE = ("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "simulate")  # see `how` and `devices`
# A value that is another's by default is left out where it is the same.
FOLLOWS = {
    "data.seed": "seed",
    "scheduler.epochs": "trainer.max_epochs",
    "module.num_classes": "model.num_classes",
}


def settings(run: Run) -> dict[str, Any]:
    """What can change the result, the seed apart; empty where the settings cannot be read. null is as if not there.

    ``devices`` stands for all ways to have so many: processes on one node or several, or one process for all of them.
    With ``norm.batch_size`` the group and the ghost batch that it picked are left out. ``ckpt_path`` is the checkpoint
    that the user named, not the one that a later attempt went on from; of a run that only tests it is left out.
    """
    if not run.config:
        return {}
    every = flat(run.config)
    skipped = tuple(f"{name}." for name in (*BOOKKEEPING, *PLACE, *COPIES))
    kept = {name: value for name, value in every.items() if not f"{name}.".startswith(skipped)}
    for name, origin in FOLLOWS.items():
        if kept.get(name) == every.get(origin):
            kept.pop(name, None)
    kept.pop("seed", None)
    if kept.get("norm.batch_size") is not None:
        kept.pop("norm.group", None)
        kept.pop("norm.ghost_batch", None)
    kept["devices"] = devices(run)
    if kept.get("mode") == "train":  # as before there were others
        kept.pop("mode")
    # What is tested is another checkpoint for each seed.
    if run.about.get("begun_from") and not run.about.get("tests"):
        kept["ckpt_path"] = run.about["begun_from"]
    return {name: _plain(value) for name, value in kept.items() if value is not None}


def implied(factor: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    """Which of the batch per device, the global batch and the devices to leave out: two of them say the third."""
    device_batch, global_batch = "data.batch_size", "data.global_batch_size"
    if global_batch in factor:
        return device_batch
    global_batch_is_kept = len({each.get(global_batch) for each in runs}) == 1
    others = {"devices": device_batch, device_batch: "devices"}
    return next((others[name] for name in factor if name in others and global_batch_is_kept), global_batch)


def devices(run: Run) -> int:
    """How many devices trained, or one process stood for; 0 where the settings cannot be read."""
    trainer = run.config.get("trainer") or {}
    numbers = run.config.get("simulate"), trainer.get("devices"), trainer.get("num_nodes", 1)
    simulated, per_node, nodes = (number if isinstance(number, int) else 0 for number in numbers)
    return simulated or per_node * nodes


def is_simulated(run: Run) -> bool:
    """Whether one process stood for several devices."""
    return bool(run.config.get("simulate"))


def place(run: Run) -> str:
    """Where the devices were, without their number: runs of two places are never a pair."""
    if not run.config:
        return ""
    on_gpu = (run.config.get("trainer") or {}).get("accelerator") == "gpu"
    if is_simulated(run):
        return f"one process on {'a GPU' if on_gpu else 'the CPU'}"
    return f"processes on {'GPUs' if on_gpu else 'the CPU'}"


def how(run: Run) -> str:
    """The same with numbers, for people: "2 processes on the CPU", "1 process for 2 devices"."""
    if not run.config:
        return ""
    number, on_gpu = devices(run), place(run).endswith(GPU)
    if is_simulated(run):
        return f"1 process for {number} device{'s' * (number != 1)}{' on a GPU' * on_gpu}"
    nodes = run.config["trainer"].get("num_nodes", 1)
    across = f" of {nodes} nodes" if isinstance(nodes, int) and nodes > 1 else ""
    return f"{number} process{'es' * (number != 1)} on {'GPUs' if on_gpu else 'the CPU'}{across}"


def _plain(value: Any) -> Any:
    """Something that can be a key: a list is its text."""
    return value if isinstance(value, bool | int | float | str | None) else str(value)
