"""Whether a checkpoint can be continued from with these settings."""

import math
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

# What a checkpoint has to have for a training to be continued from it; weights alone need the first.
WEIGHTS, STATE = "state_dict", ("optimizer_states", "lr_schedulers", "loops", "global_step")


def check_usable(path: Path, plan: Plan, say: Callable[[str], None]) -> Path:
    """The whole path of a checkpoint that these settings can go on from."""
    checkpoint = load_checkpoint(path)
    if epochs_done(checkpoint) is None:
        raise SettingError(
            str(path), hint="it does not say how many epochs were done; remove it, or use another run.id"
        )
    point, batch = checkpoint.get("resume", {}), plan.global_batch_size
    if point.get("global_batch_size") not in (None, batch):
        raise SettingError(
            "data.global_batch_size",
            batch,
            f"{path} was trained with {point['global_batch_size']}, and only that resumes it; with {plan.world_size} "
            f"devices use data.global_batch_size={point['global_batch_size']}",
        )
    if not (point.get("epoch_is_over", True) or point.get("begins_anew")):
        _check_position(path, point.get("counted_in"), plan)
    before, now = point.get("world_size"), plan.world_size
    if before not in (None, now):
        say(
            f"it was trained by {before} processes so far and goes on with {now}: weights, optimizer and the order of "
            "the data carry over exactly, random numbers (dropout) begin anew"
        )
    return path.absolute()  # a symbolic link in the run directory is the run's, wherever it leads


def whole_checkpoint(path: Path) -> Path:
    """A checkpoint that the user named within its run.

    Raises:
        SettingError: it holds the weights alone.
    """
    if lacks := lacking_parts(load_checkpoint(path)):
        raise SettingError(
            "ckpt_path",
            path,
            f"it has no {', '.join(lacks)}, so no training can be continued from it; run.id=NAME begins another run "
            "with its weights",
        )
    return path


def lacking_parts(checkpoint: dict[str, Any]) -> list[str]:
    """What a training needs to be continued, and this checkpoint has not."""
    lacks = [name for name in STATE if name not in checkpoint]
    return lacks or (["number of epochs"] if epochs_done(checkpoint) is None else [])


def refuse_less_training(path: Path, cfg: DictConfig, earlier: DictConfig, run_dir: Path) -> None:
    """Refuses less training than the run has done already; as much is well: its test may be what is missing."""
    checkpoint, trainer = load_checkpoint(path), cfg.trainer
    epochs, steps = epochs_done(checkpoint) or 0, checkpoint.get("global_step", 0)
    part = "" if checkpoint.get("resume", {}).get("epoch_is_over", True) else " and a part of the next"
    instead = f"use at least that, or another id than {run_dir.name}"
    most = trainer.get("max_epochs")
    if most not in (None, -1) and (most < epochs or (part and most == epochs != earlier.trainer.get("max_epochs"))):
        enough = epochs + bool(part)
        raise SettingError(
            "trainer.max_epochs",
            most,
            f"this run has done {_count(epochs, 'epoch')}{part}; use at least {enough}, or another id than "
            f"{run_dir.name}",
        )
    most = trainer.get("max_steps", -1)
    if most not in (None, -1, earlier.trainer.get("max_steps", -1)) and most < steps:
        raise SettingError("trainer.max_steps", most, f"this run has done {_count(steps, 'step')}; {instead}")
    limit = trainer.get("max_time")
    if limit is not None and limit != earlier.trainer.get("max_time"):
        spent = _trained_for(checkpoint)
        if _seconds(limit) < spent:
            raise SettingError("trainer.max_time", limit, f"this run has trained for {spent:.0f} s; {instead}")


def _trained_for(checkpoint: dict[str, Any]) -> float:
    """Seconds of training so far; Lightning's Timer, which is there with ``max_time``, counts them."""
    states = checkpoint.get("callbacks") or {}
    elapsed = [state.get("time_elapsed", {}).get("train", 0.0) for name, state in states.items() if "Timer" in name]
    return float(max(elapsed, default=0.0))


def _seconds(limit: Any) -> float:
    """Of ``DD:HH:MM:SS``, or a ``dict`` for a ``timedelta``; what Lightning will refuse is no limit here."""
    try:
        if isinstance(limit, str):
            days, hours, minutes, seconds = map(int, limit.split(":"))
            return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds).total_seconds()
        return timedelta(**limit).total_seconds()
    except (TypeError, ValueError):
        return math.inf


def epochs_done(checkpoint: dict[str, Any]) -> int | None:
    """How many epochs were done; None where the checkpoint does not say."""
    part: Any = checkpoint
    for name in ("loops", "fit_loop", "epoch_progress", "current", "processed"):
        part = part.get(name) if isinstance(part, dict) else None
    return part if isinstance(part, int) else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What is in a checkpoint."""
    if not paths.is_file(path):
        beside = sorted(str(p) for p in path.parent.glob("*.ckpt") if paths.is_file(p))
        hint = f"there are {', '.join(beside)}" if beside else "a run keeps its own in outputs/RUN/checkpoints"
        what = "this is a directory" if paths.is_directory(path) else "there is no such file"
        if paths.is_link(path):
            what = "this is a symbolic link to a file that is not there"
        raise SettingError("ckpt_path", printable(path), f"{what}; {hint}")
    try:
        checkpoint = files.load(path)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"it holds a {type(checkpoint).__name__}")
    except Exception as error:
        others = [p for p in (files.newest(path.parent, lambda line: None),) if p not in (None, path)]
        hint = f"; a sound one is {others[0]}" if others else ""
        said = " ".join(str(error).split())[:300]
        raise SettingError(
            "ckpt_path", path, f"no checkpoint of a training run can be read from it ({said}){hint}"
        ) from error
    return checkpoint


def _check_position(path: Path, before: dict[str, int | None] | None, plan: Plan) -> None:
    """Refuses to resume in the middle of an epoch where the position would not be the same samples."""
    if before is not None and before != plan.position_unit:
        raise SettingError(
            _position(plan.position_unit),
            hint=f"{path} lies in the middle of an epoch that was counted with {_position(before)}; resume with that, "
            "or from a checkpoint of an epoch's end (ckpt_path=)",
        )


def _position(unit: dict[str, int | None]) -> str:
    return f"simulate={unit['simulate'] or 'null'} and {unit['samples']} samples at once"
