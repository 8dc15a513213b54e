"""What the list can show, filter and sort by: fields, settings and metrics, found by the name that the user types."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncbn.runs.read import Run
from syncbn.training.composition.nearest import nearest, suggestion
from syncbn.training.errors import SettingError, as_typed

FIELDS = ("run", "status", "started", "error", "tests")
ALIASES = {"images/s": "images_per_second", "when": "started", "path": "run"}
# Groups and settings that repeat others, or name the run. The first are syncbn.training.config.compare.COPIES, whose
# module imports OmegaConf; a test compares the two.
REPEATED = (
    *("module.network", "module.optimizer", "module.scheduler", "module.layer_decay", "module.lr_scale"),
    *("data.augment", "data.mix", "module.num_classes"),
    *("run.id", "callbacks.checkpoint.dirpath", "trainer.profiler.dirpath", "study", "logger.group", "logger.name"),
    *("logger.tags", "optimizer.lr_given"),
)
CHECKPOINTS = ("ckpt_path", "tests")
ABSENT = object()
Value = Any


class Names:
    """The names of what these runs have.

    Args:
        runs: all runs that were found.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.settings = set().union(*(run.settings for run in runs)) if runs else set()
        self.numbers = set().union(*(run.numbers for run in runs)) if runs else set()
        self.known = [*FIELDS, *self.settings, *self.numbers]

    def find(self, option: str, name: str, given: str | None = None) -> str:
        """The name of a field, setting or metric: its own, that of a group, or the last part of a setting's name.

        ``norm`` is ``norm.name``, ``model`` its class, and ``lr`` the only setting that ends so.

        Args:
            option: that has the name, for the error.
            name: as it was typed.
            given: the value of the option in the error; by default the name.

        Raises:
            SettingError: no run has it; the hint names the nearest.
        """
        name = ALIASES.get(name, name)
        for each in (name, f"{name}.name", f"{name}._target_"):
            if each in self.settings or each in self.numbers or each in FIELDS:
                return each
        same = [each for each in self.settings if each.rpartition(".")[2] == name and not is_repeated(each)]
        if len(same) == 1:
            return same[0]
        near = nearest(name, self.known)
        hint = suggestion(name, self.known) if near else f"use {', '.join(FIELDS)}, a setting or a metric"
        raise SettingError(option, name if given is None else given, f"no run here has {name}; {hint}")


def value(run: Run, name: str) -> Value:
    """The value of a field, setting or metric; ``ABSENT`` if the run does not have it.

    A setting of a group that is null is null: ``augment.name`` of a run without augmentation.
    """
    if name in FIELDS:
        return {"run": run.path, "started": run.when}.get(name) or getattr(run, name, "")
    if name in run.numbers:
        return run.numbers[name]
    if name in run.settings:
        return run.settings[name]
    above = name
    while above := above.rpartition(".")[0]:
        if above in run.settings:
            return None
    return ABSENT


def is_repeated(name: str) -> bool:
    """Whether a setting repeats another one, or names the run."""
    return f"{name}.".startswith(tuple(f"{each}." for each in REPEATED))


def text(each: Value, name: str = "") -> str:
    """A value as the user types it; of a class its name without the module, of a checkpoint its run and its name."""
    if each is ABSENT:
        return ""
    if isinstance(each, float):
        return f"{each:.4g}" if math.isfinite(each) else str(each)
    if isinstance(each, list):
        return f"[{','.join(map(text, each))}]"
    shown = as_typed(each)
    if name in CHECKPOINTS and shown.endswith(".ckpt"):
        return "/".join([*[part for part in shown.split("/")[:-1] if part != "checkpoints"][-1:], Path(shown).stem])
    return shown.rpartition(".")[2] if name.endswith("_target_") else shown
