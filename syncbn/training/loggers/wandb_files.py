"""Reads the local directories of a W&B run, one per attempt, and finds those that have to be uploaded."""

import glob
import sys
from pathlib import Path

from syncbn.training.errors import SettingError
from syncbn.training.loggers import wandb_internals
from syncbn.training.read_file import DamagedError, read_json


def check_names(directory: Path) -> None:
    """Check that W&B can take the directory and the command line, which must be valid UTF-8.

    Raises:
        SettingError: one of them is not.
    """
    for text in (str(directory), *sys.argv):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise SettingError(
                "logger",
                "wandb",
                "W&B takes UTF-8 only, and Python, with the encoding "
                f"{sys.getfilesystemencoding()}, cannot convert this name: {text}; use PYTHONUTF8=1, another name, or "
                "logger=csv",
            ) from None


def directories(run_dir: Path) -> list[Path]:
    """Return the directories of this W&B run, earliest first; empty if ``run.json`` has no W&B id."""
    try:
        wandb_id = read_json(run_dir / "run.json")["wandb_id"]
    except (OSError, DamagedError, KeyError):
        return []
    if not isinstance(wandb_id, str) or "/" in wandb_id:  # this run.json was not written by syncbn
        return []
    found = {log.parent.resolve() for log in (run_dir / "wandb").glob(f"*run-*/run-{glob.escape(wandb_id)}.wandb")}
    return sorted(found, key=lambda d: d.name.removeprefix("offline-"))


def waiting(run_dir: Path) -> list[Path]:
    """Return the directories that have to be uploaded: offline attempts, and online ones with an incomplete upload.

    The log of an attempt that was killed early has only a header. It is left out, because with it ``wandb sync`` would
    upload nothing at all.
    """
    return [
        directory
        for directory in directories(run_dir)
        if (is_offline(directory) or wandb_internals.upload_failed(directory) or (directory / "unsent").exists())
        and not wandb_internals.was_synced(directory)
        and wandb_internals.has_records(directory)
    ]


def upload(run_dir: Path) -> tuple[list[str], list[Path]]:
    """Return the arguments of the ``wandb`` command that uploads the run: options, and directories (may be empty).

    ``wandb sync`` itself merges the attempts of one run in their order. By default it skips online ones.
    """
    found = waiting(run_dir)
    return ["sync", *([] if all(map(is_offline, found)) else ["--include-online"])], found


def is_offline(directory: Path) -> bool:
    """Whether W&B ran offline in this attempt."""
    return directory.name.startswith("offline-")


def mark_unsent(directory: Path) -> None:
    """Record that an attempt ended before it was uploaded completely."""
    (directory / "unsent").touch()
