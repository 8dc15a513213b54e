"""Writes checkpoint files that are there whole or not at all, and hold nothing but plain data."""

import pickle
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from syncbn.training.atomic_write import flush, unlinked
from syncbn.training.checkpoint import files
from syncbn.training.console import print_line
from syncbn.training.os_errors import ADVICE, free

HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")  # of save_hyperparameters()
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.Size, torch.dtype)


class SaveError(RuntimeError):
    """A checkpoint could not be written. What was saved before is untouched."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name, flushes to the disk, renames: a crash leaves the old file or the new.

    Hyper-parameters that are objects are left out, which is said once. The first file is read back, so that one which
    would not load is no surprise at the end of the training.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read_back = False
        self._left_out: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises:
        SaveError: the file system would not take it.
        """
        path, checkpoint = Path(path), self._without_objects(checkpoint)
        draft = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path.parent)
            with unlinked(draft).open("wb") as file:  # not by its name, which torch encodes in UTF-8
                torch.save(checkpoint, file)
            flush(draft)
            if not self._read_back:
                files.load(draft)
                self._read_back = True
            draft.replace(path)
            flush(path.parent)
        except pickle.UnpicklingError as error:
            draft.unlink(missing_ok=True)
            raise SaveError(f"{path} would hold more than plain data: {_culprit(error)}") from error
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError where there is no space
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise SaveError(_why(path, error)) from error

    def _without_objects(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in checkpoint.items() if not key.endswith("hparams_type")}  # a class, if any
        for key in HYPER_PARAMETERS:
            found = kept.get(key)
            if found is None:
                continue
            found = dict(found) if isinstance(found, dict) else {}
            kept[key] = {name: value for name, value in found.items() if _is_plain(value)}
            left_out = found.keys() - kept[key].keys() - self._left_out
            if left_out:
                self._left_out |= left_out
                names = ", ".join(sorted(left_out))
                print_line(f"save_hyperparameters(): not in checkpoints, as no plain data: {names}")
        return kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items())
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN) and type(value).__module__ in ("builtins", "torch")


def _culprit(error: BaseException) -> str:
    """The class that torch will not load, out of its long text."""
    found = re.search(r"(?:GLOBAL|global|class) [`']?([\w.]+)", str(error))
    what = f"an object of {found[1]}" if found else " ".join(str(error).split())[:200]
    return f"{what}; give on_save_checkpoint and state_dict() numbers, strings, tensors, and lists and dicts of these"


def _remove_leftovers(directory: Path) -> None:
    """Resume points that a killed process was writing: no other writes any, for a run directory has one at a time.

    Drafts of other names are written over by the next of that name, and the directory of these may be shared.
    """
    for draft in directory.glob(".step-*.ckpt.part"):
        with suppress(OSError):  # it would do no harm
            draft.unlink()


def _why(path: Path, error: BaseException) -> str:
    cause = error if isinstance(error, OSError) and error.errno else _refusal(path.parent)
    advice = ADVICE.get(cause.errno or 0, "use another directory") if cause else "make room"
    said = " ".join(str(error).split())[:200]
    if cause is not None and cause is not error:
        said = f"{cause.strerror}: {said}"
    return f"{path} could not be written ({said}; {free(path)}): {advice}; checkpoints from before are whole"


def _refusal(directory: Path) -> OSError | None:
    """What the system says to a file there: torch's writer passes on none of that."""
    probe = directory / ".probe.part"
    try:
        probe.write_bytes(bytes(2**20))
        flush(probe)
    except OSError as error:
        return error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return None
