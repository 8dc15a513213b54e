"""Checks whether training can resume from a checkpoint with the current settings."""

import math
import os
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from syncbn.training.checkpoint import files
from syncbn.training.config.plan import Plan
from syncbn.training.console import printable
from syncbn.training.errors import SettingError
from syncbn.training.run_directory import paths

# The keys of a checkpoint that training can resume from. A start from the weights only needs the first.
WEIGHTS, STATE = "state_dict", ("optimizer_states", "lr_schedulers", "loops", "global_step")


def check_usable(path: Path, plan: Plan, report: Callable[[str], None]) -> Path:
    """Checks that training can resume from a checkpoint with these settings, and returns its absolute path.

    A change of the number of processes is reported.

    Raises:
        SettingError: the checkpoint has another global batch size, or its position in the epoch has another unit.
    """
    checkpoint = load_checkpoint(path)
    if epochs_done(checkpoint) is None:
        hint = "it does not record how many epochs are done; remove it, or use another run.id"
        raise SettingError(str(path), hint=hint)
    point, batch = checkpoint.get("resume", {}), plan.global_batch_size
    if (trained := point.get("global_batch_size")) not in (None, batch):
        hint = f"{path} was trained with {trained}, and only that resumes it; "
        hint += f"with {plan.world_size} devices use data.global_batch_size={trained}"
        raise SettingError("data.global_batch_size", batch, hint)
    within_epoch = not (point.get("epoch_is_over", True) or point.get("begins_anew"))
    counted_in = point.get("counted_in")
    if within_epoch and counted_in not in (None, plan.position_unit):  # the position would be at other samples
        hint = f"{path} was saved in the middle of an epoch with {_position(counted_in)}; "
        hint += "resume with that, or from a checkpoint of an epoch's end (ckpt_path=)"
        raise SettingError(_position(plan.position_unit), hint=hint)
    before, now = point.get("world_size"), plan.world_size
    if before not in (None, now):
        report(
            f"the checkpoint was trained with {before} processes and resumes with {now}: weights, optimizer and the "
            "order of the data carry over exactly, random numbers (dropout) do not"
        )
    # Not resolve(): a checkpoint in the run directory that is a symbolic link belongs to this run, wherever it leads.
    return path.absolute()


def missing_parts(checkpoint: dict[str, Any]) -> list[str]:
    """The parts of the training state that this checkpoint lacks; empty if training can resume from it."""
    missing = [name for name in STATE if name not in checkpoint]
    return missing or (["number of epochs"] if epochs_done(checkpoint) is None else [])


def refuse_less_training(path: Path, cfg: DictConfig, earlier: DictConfig, run_dir: Path) -> None:
    """Refuses limits that are lower than the training that the run has done already.

    Equal limits are accepted: the run may have been interrupted between training and test.
    """
    checkpoint, trainer = load_checkpoint(path), cfg.trainer
    epochs, steps = epochs_done(checkpoint) or 0, checkpoint.get("global_step", 0)
    part = "" if checkpoint.get("resume", {}).get("epoch_is_over", True) else " and a part of the next"
    another = f"or another id than {run_dir.name}"
    most = trainer.get("max_epochs")
    if most not in (None, -1) and (most < epochs or (part and most == epochs != earlier.trainer.get("max_epochs"))):
        hint = f"this run has done {_count(epochs, 'epoch')}{part}; use at least {epochs + bool(part)}, {another}"
        raise SettingError("trainer.max_epochs", most, hint)
    most = trainer.get("max_steps", -1)
    if most not in (None, -1, earlier.trainer.get("max_steps", -1)) and most < steps:
        hint = f"this run has done {_count(steps, 'step')}; use at least that, {another}"
        raise SettingError("trainer.max_steps", most, hint)
    limit = trainer.get("max_time")
    if limit is not None and limit != earlier.trainer.get("max_time"):
        spent = _trained_for(checkpoint)
        if _seconds(limit) < spent:
            hint = f"this run has trained for {spent:.0f} s; use at least that, {another}"
            raise SettingError("trainer.max_time", limit, hint)


def _trained_for(checkpoint: dict[str, Any]) -> float:
    """Seconds of training so far, from Lightning's Timer callback, which ``max_time`` adds; 0 without one."""
    states = checkpoint.get("callbacks") or {}
    elapsed = [state.get("time_elapsed", {}).get("train", 0.0) for name, state in states.items() if "Timer" in name]
    return float(max(elapsed, default=0.0))


def _seconds(limit: Any) -> float:
    """The seconds of a ``max_time``: ``DD:HH:MM:SS``, or the arguments of a ``timedelta`` as a dict.

    A value that cannot be parsed is infinite here: Lightning refuses it with its own error.
    """
    try:
        if isinstance(limit, str):
            days, hours, minutes, seconds = map(int, limit.split(":"))
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
        return timedelta(**limit).total_seconds()
    except (TypeError, ValueError):
        return math.inf


def epochs_done(checkpoint: dict[str, Any]) -> int | None:
    """The number of epochs that are done; None if the checkpoint does not record it."""
    part: Any = checkpoint
    for name in ("loops", "fit_loop", "epoch_progress", "current", "processed"):
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, int) else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads a checkpoint of a training run.

    Raises:
        SettingError: there is no such file, or it cannot be loaded.
    """
    if not paths.is_file(path):
        beside = sorted(str(p) for p in path.parent.glob("*.ckpt") if paths.is_file(p))
        hint = f"there are {', '.join(beside)}" if beside else "a run keeps its own in outputs/RUN/checkpoints"
        # Unlike Path's methods these raise no error for a name that no file can have.
        what = "this is a directory" if os.path.isdir(path) else "there is no such file"  # noqa: PTH112
        if os.path.islink(path):  # noqa: PTH114
            what = "this is a symbolic link to a file that is not there"
        raise SettingError("ckpt_path", printable(path), f"{what}; {hint}")
    try:
        checkpoint = files.load(path)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
    except Exception as error:
        others = [p for p in (files.newest(path.parent, lambda line: None),) if p not in (None, path)]
        hint = f"; an intact one is {others[0]}" if others else ""
        hint = f"no checkpoint of a training run can be read from it ({_reason(path, error)}){hint}"
        raise SettingError("ckpt_path", path, hint) from error
    return checkpoint


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be loaded. For one that is not a whole zip file, torch 2.13 raises ``Invalid argument``."""
    if isinstance(error, OSError | RuntimeError) and os.access(path, os.R_OK) and not zipfile.is_zipfile(path):
        return "it is incomplete, or was not written by torch.save" if path.stat().st_size else "it is empty"
    return " ".join(str(error).split())[:300]


def _position(unit: dict[str, int | None]) -> str:
    return f"simulate={unit['simulate'] or 'null'} and {unit['samples']} samples at once"
