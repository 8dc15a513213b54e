"""Repairs the state of ModelCheckpoint when a run resumes: paths of a run that was moved, damaged files."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from syncbn.training.checkpoint import files
from syncbn.training.console import print_line
from syncbn.training.run_directory.paths import real


def relocate(trainer: pl.Trainer, directory: Path, states: dict[str, Any]) -> None:
    """Gives the ``states`` of each ModelCheckpoint in a checkpoint of ``trainer`` the paths of ``directory``, in place.

    ModelCheckpoint deletes the files that its state names, and the best one is tested. If the run was moved, its
    paths are mapped to the new directory. Paths of another run are dropped, so that its files are not deleted.
    """
    ours = real(Path(str(trainer.ckpt_path)).parent) == real(directory)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and isinstance(states.get(callback.state_key), dict):
            states[callback.state_key] = _relocated(states[callback.state_key], str(callback.dirpath), ours)


def _relocated(state: dict[str, Any], home: str, ours: bool) -> dict[str, Any]:
    before = os.path.normpath(str(state.get("dirpath")))
    ours = ours or before == os.path.normpath(home)

    def moved(path: Any) -> str:
        path = os.path.normpath(str(path))
        now = home + path.removeprefix(before)
        inside = ours and path.startswith(f"{before}{os.sep}")
        return now if inside and ("://" in home or Path(now).is_file()) else ""  # a URL cannot be checked here

    paths = {name: moved(state.get(name)) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
    models = {moved(path): score for path, score in dict(state.get("best_k_models", {})).items() if moved(path)}
    return state | paths | {"best_k_models": models} | ({"dirpath": home} if ours else {})


def forget_damaged(trainer: pl.Trainer) -> None:
    """Removes damaged files from the state of each ModelCheckpoint: the best of them would be tested after training.

    All ranks call this. Rank 0 reads the files and prints a line about each damaged one.
    """
    for each in trainer.checkpoint_callbacks:
        if not isinstance(each, ModelCheckpoint):
            continue
        known = sorted({*each.best_k_models, *filter(None, [each.best_model_path])})
        read = known if trainer.is_global_zero else []  # rank 0 decides for all ranks
        damaged = {path: wrong for path in read if (wrong := files.damage(Path(path)))}
        damaged = trainer.strategy.broadcast(damaged)
        if damaged:
            _forget(each, damaged)
        for path, wrong in damaged.items() if trainer.is_global_zero else ():
            print_line(
                f"{Path(path).name} is damaged ({wrong}): it is no longer the best checkpoint, and is not tested"
            )


def _forget(callback: ModelCheckpoint, damaged: dict[str, str]) -> None:
    intact = {path: score for path, score in callback.best_k_models.items() if path not in damaged}
    best, worst = (min, max) if callback.mode == "min" else (max, min)
    callback.best_k_models = intact
    callback.best_model_path = best(intact, key=intact.__getitem__) if intact else ""
    callback.best_model_score = intact.get(callback.best_model_path)
    callback.kth_best_model_path = worst(intact, key=intact.__getitem__) if intact else ""
    callback.kth_value = intact.get(callback.kth_best_model_path, callback.kth_value)
