"""Reads what W&B wrote for a run, by W&B's own program."""

import json
import subprocess
from pathlib import Path
from typing import Any

from syncbn.training.loggers import wandb_internals


def records(directory: Path) -> list[dict[str, Any]]:
    """All records in the log of one attempt, in order; ``directory`` is ``.../wandb/offline-run-...``."""
    return [json.loads(line) for line in _inspect(directory).splitlines()]


def run(directory: Path) -> dict[str, Any]:
    """What the log says of the run itself: ``run_id``, ``display_name``, ``project``, ``run_group``, ``job_type``."""
    (found,) = (each["run"] for each in records(directory) if "run" in each)
    return found


def summary(directory: Path) -> dict[str, Any]:
    """How the attempt stands at its end: ``config``, ``summary``, ``state``, ``exit_code``."""
    return json.loads(_inspect(directory, "--summary"))


def _inspect(directory: Path, *options: str) -> str:
    program, *words = wandb_internals.inspect_command(directory)  # program leet inspect OPTIONS DIRECTORY
    command = [program, *words[:2], *options, *words[2:]]
    return subprocess.run(command, capture_output=True, check=True, timeout=60, encoding="utf-8").stdout
