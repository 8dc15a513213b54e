"""The directories that W&B keeps of one run, one for each attempt: what is in them, and how to upload them."""

import glob
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from syncbn.training.errors import SettingError
from syncbn.training.loggers import wandb_internals
from syncbn.training.read_file import DamagedError, read_json


def check_names(directory: Path) -> None:
    """Raises:
    SettingError: W&B could not be given the directory or the command, which have to be UTF-8.
    """
    for text in (str(directory), *sys.argv):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise SettingError(
                "logger",
                "wandb",
                "W&B takes UTF-8 only, and this is not UTF-8 for Python, which uses "
                f"{sys.getfilesystemencoding()} here: {text}; use PYTHONUTF8=1, another name, or logger=csv",
            ) from None


def directories(run_dir: Path) -> list[Path]:
    """All that belong to this W&B run, the earliest first; none where the run directory does not name it."""
    try:
        wandb_id = read_json(run_dir / "run.json")["wandb_id"]
    except (OSError, DamagedError, KeyError):
        return []
    if not isinstance(wandb_id, str) or "/" in wandb_id:  # no file that this program wrote
        return []
    found = {log.parent.resolve() for log in (run_dir / "wandb").glob(f"*run-*/run-{glob.escape(wandb_id)}.wandb")}
    return sorted(found, key=lambda d: d.name.removeprefix("offline-"))


def waiting(run_dir: Path) -> list[Path]:
    """Those that are to be uploaded: of offline attempts, and of online ones whose server went away before the end.

    One with nothing but a header in it was killed early; ``wandb sync`` would upload none because of it.
    """
    return [
        directory
        for directory in directories(run_dir)
        if (is_offline(directory) or _gave_up(directory))
        and not wandb_internals.was_synced(directory)
        and wandb_internals.has_records(directory)
    ]


def upload(run_dir: Path) -> tuple[list[str], list[Path]]:
    """What ``wandb`` is to be called with, options and directories; no directories where there is nothing to upload.

    ``wandb sync`` puts the attempts of one run one after the other itself, and passes over online ones by default.
    """
    found = waiting(run_dir)
    return ["sync", *([] if all(map(is_offline, found)) else ["--include-online"])], found


def is_offline(directory: Path) -> bool:
    """Whether W&B kept this attempt for itself."""
    return directory.name.startswith("offline-")


def history(directory: Path) -> list[dict[str, Any]]:
    """The lines that one attempt has logged, up to the place where it was killed."""
    command = wandb_internals.inspect_command(directory)
    offline = os.environ | {"WANDB_MODE": "offline"}  # nothing is reported to W&B
    printed = subprocess.run(command, env=offline, capture_output=True, encoding="utf-8", errors="replace").stdout
    return [json.loads(line)["history"]["item"] for line in printed.splitlines() if '"type":"history"' in line]


def mark_unsent(directory: Path) -> None:
    """Notes that an attempt ended before all of it was uploaded."""
    (directory / "unsent").touch()


def _gave_up(directory: Path) -> bool:
    """Whether not all was uploaded: time ran out, or W&B's process gave up before."""
    return wandb_internals.upload_failed(directory) or (directory / "unsent").exists()
