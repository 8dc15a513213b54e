"""Writes checkpoint files that are there whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO


class SaveError(RuntimeError):
    """A checkpoint could not be written. What was saved before is untouched."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name, flushes to the disk, renames: a crash leaves the old file or the new."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises:
        SaveError: the file system would not take it.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        draft = path.with_name(f".{path.name}.part")
        try:
            torch.save(checkpoint, draft)
            _flush(draft)
            draft.replace(path)
            _flush(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError where there is no space
            draft.unlink(missing_ok=True)
            raise SaveError(_why(path, error)) from error


def _remove_leftovers(directory: Path) -> None:
    """Resume points that a killed process was writing: no other writes any, for a run directory has one at a time.

    Drafts of other names are written over by the next of that name, and the directory of these may be shared.
    """
    for draft in directory.glob(".step-*.ckpt.part"):
        with suppress(OSError):  # it would do no harm
            draft.unlink()


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _why(path: Path, error: BaseException) -> str:
    free = os.statvfs(path.parent)
    left = free.f_bavail * free.f_frsize / 2**20
    return (
        f"{path} could not be written ({' '.join(str(error).split())[:200]}; {left:,.0f} MiB are free there): "
        "make room; checkpoints from before are whole"
    )
