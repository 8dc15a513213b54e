"""Finds the settings that differ between runs, without those that repeat or follow from others."""

from collections.abc import Sequence
from typing import Any

from syncbn.runs.names import ABSENT, is_repeated, text, value
from syncbn.runs.read import Run

# A setting that is the value of another one unless it is set. It is left out where the two are equal in all runs.
FOLLOWS = {
    "data.seed": "seed",
    "scheduler.epochs": "trainer.max_epochs",
    "model.num_classes": "data.num_classes",
    "model.in_channels": "data.in_channels",
    "data.num_shards": "trainer.devices",
}
PARTS = ("data.batch_size", "trainer.devices", "trainer.num_nodes")  # of the global batch
# The order of columns: what is varied most often first.
FIRST = (
    *("norm.name", "norm.batch_size", "model._target_", "model.name", "data._target_", "data.name", "data.root"),
    *("data.batch_size", "trainer.devices", "optimizer._target_", "optimizer.lr"),
)
LAST = ("seed", "mode", "ckpt_path", "data.", "callbacks.", "trainer.", "logger.", "resume.", "timeouts.", "cluster.")


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings that differ between these runs, those that are varied most often first.

    A setting that some runs lack, since their network has no such argument or they are of an earlier version, differs
    only if others have two values of it.
    """
    if len(runs) < 2:
        return []
    found = [name for name, values in _values(runs).items() if not is_repeated(name) and _differs(runs, name, values)]
    found = [name for name in found if not _follows(runs, name)]
    if {"data.global_batch_size", "data.batch_size"} <= {*found} and _is_product(runs):
        found.remove("data.global_batch_size")
    return sorted((name for name in found if name in FIRST or not _comes_with(runs, name, found)), key=_order)


def _values(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The values of each setting, without some of those that are equal. ``ABSENT`` is one if some runs lack it.

    Equal text in two files is mostly the same object (see :mod:`syncbn.runs.config_blocks`), so objects are compared by
    identity first: 2,000 runs have 300,000 settings.
    """
    by_names: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        by_names.setdefault(tuple(run.settings), []).append(run)
    found: dict[str, dict[int, Any]] = {name: {} for names in by_names for name in names}
    for names, alike in by_names.items():
        for name, column in zip(names, zip(*(run.settings.values() for run in alike), strict=True), strict=False):
            found[name].update(zip(map(id, column), column, strict=True))
        for name in found.keys() - {*names}:
            found[name][id(ABSENT)] = ABSENT
    return {name: list(values.values()) for name, values in found.items()}


def _differs(runs: Sequence[Run], name: str, values: list[Any]) -> bool:
    if len(values) == 1:
        return False
    # Of a group that is null in some runs, only its name differs for that: not each of its settings.
    if ABSENT in values and name.endswith((".name", "._target_")):
        values = [value(run, name) for run in runs]
    return len({text(each) for each in values if each is not ABSENT}) > 1


def _follows(runs: Sequence[Run], name: str) -> bool:
    origin = FOLLOWS.get(name)
    return origin is not None and all(run.settings.get(name) == run.settings.get(origin) for run in runs)


def _comes_with(runs: Sequence[Run], name: str, found: Sequence[str]) -> bool:
    """Whether a setting follows from the file that was chosen for its group: ``data.val_fraction`` from ``data``."""
    group = name.partition(".")[0]
    chosen = [each for each in (f"{group}._target_", f"{group}.name") if each in found and each != name]
    values: dict[tuple[str, ...], set[str]] = {}
    for run in runs if chosen else ():
        if name in run.settings:
            key = tuple(text(run.settings.get(each)) for each in chosen)
            values.setdefault(key, set()).add(text(run.settings[name]))
    return bool(values) and all(len(each) == 1 for each in values.values())


def _is_product(runs: Sequence[Run]) -> bool:
    """Whether the global batch is that of all devices in each run."""
    for settings in (run.settings for run in runs if run.settings):
        each, devices, nodes = (settings.get(name, 1) for name in PARTS)
        replicas = settings.get("simulate") or (devices * nodes if isinstance(devices, int) else 0)
        if each is None or each * replicas != settings["data.global_batch_size"]:
            return False
    return True


def _order(name: str) -> tuple[int, int, str]:
    if name in FIRST:
        return 0, FIRST.index(name), name
    last = next((place for place, each in enumerate(LAST) if name.startswith(each)), -1)
    return (1, 0, name) if last < 0 else (2, last, name)
