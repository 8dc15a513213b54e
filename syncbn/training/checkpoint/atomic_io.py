"""Writes checkpoint files atomically, and keeps everything but plain data out of them.

Plain data are numbers, strings, tensors, and lists and dicts of these. ``torch.load(weights_only=True)`` loads such a
file without running code from it.
"""

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
    """A checkpoint could not be written. Earlier checkpoints are intact."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, flushes it to the disk and renames it.

    A crash at any moment leaves the old file or the new file, never a part of one. Hyper-parameters that are not plain
    data are left out; the first time, their names are printed. The first file is read back before it is renamed, so a
    module whose checkpoints cannot be loaded fails at the first checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read_back = False
        self._left_out: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Raises:
        SaveError: the file system refused the file, or the checkpoint holds more than plain data.
        """
        path, checkpoint = Path(path), self._without_objects(checkpoint)
        draft = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path.parent)
            # An open file and not its name: torch encodes a name in UTF-8, and this one may be in another encoding.
            with unlinked(draft).open("wb") as file:
                torch.save(checkpoint, file)
            flush(draft)
            if not self._read_back:
                files.load(draft)
                self._read_back = True
            draft.replace(path)
            flush(path.parent)
        except pickle.UnpicklingError as error:
            draft.unlink(missing_ok=True)
            raise SaveError(f"{path} would hold more than plain data: {_unloadable(error)}") from error
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError when the disk is full
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise SaveError(_explanation(path, error)) from error

    def _without_objects(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        # Lightning stores the class of the hyper-parameters under a key that ends with "hparams_type".
        kept = {key: value for key, value in checkpoint.items() if not key.endswith("hparams_type")}
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
                print_line(f"save_hyperparameters(): left out of checkpoints, not plain data: {names}")
        return kept


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items())
    if type(value) in (list, tuple, set):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN) and type(value).__module__ in ("builtins", "torch")


def _unloadable(error: BaseException) -> str:
    """The class that torch refuses to load, extracted from its long error message, and what to save instead."""
    found = re.search(r"(?:GLOBAL|global|class) [`']?([\w.]+)", str(error))
    what = f"an object of {found[1]}" if found else " ".join(str(error).split())[:200]
    return f"{what}; in on_save_checkpoint and state_dict() use numbers, strings, tensors, lists and dicts"


def _remove_leftovers(directory: Path) -> None:
    """Removes the drafts of resume points that a killed process has left.

    No live process is writing one: a run directory belongs to one process at a time. Drafts of other names stay. The
    next checkpoint of that name overwrites its draft, and other runs may share the directory of such a callback.
    """
    for draft in directory.glob(".step-*.ckpt.part"):
        with suppress(OSError):  # a leftover only takes space
            draft.unlink()


def _explanation(path: Path, error: BaseException) -> str:
    """One line: the file, the reason that the system reports, the free space, and what to do."""
    cause = error if isinstance(error, OSError) and error.errno else _write_error(path.parent)
    advice = ADVICE.get(cause.errno or 0, "use another directory") if cause else "make room"
    reason = " ".join(str(error).split())[:200]
    if cause is not None and cause is not error:
        reason = f"{cause.strerror}: {reason}"
    return f"{path} could not be written ({reason}; {free(path)}): {advice}; earlier checkpoints are intact"


def _write_error(directory: Path) -> OSError | None:
    """The error of a 1 MiB test file in this directory; None if it can be written.

    torch's zip writer raises a RuntimeError that lacks the error number of the system.
    """
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
