"""Runs ``train.py`` as a user does, in a directory of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
PROJECT = Path(__file__).parent / "project"


@dataclass
class Run:
    """One finished call of train.py."""

    code: int
    out: str
    err: str
    directory: Path | None

    def json(self, name: str) -> dict[str, Any]:
        assert self.directory is not None, self.err
        return json.loads((self.directory / f"{name}.json").read_text())


def train(
    where: Path, *overrides: str, launcher: list[str] | None = None, full_error: bool = False, timeout: float = 120
) -> Run:
    """``python train.py OVERRIDES`` in ``where``; the run directory is the one that was made or changed last."""
    env = environment(full_error)
    command = [*(launcher or [sys.executable]), str(REPO / "train.py"), *overrides]
    done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=timeout)
    runs = sorted(where.glob("outputs/*/run.json"), key=lambda p: p.stat().st_mtime)
    return Run(done.returncode, done.stdout, done.stderr, runs[-1].parent if runs else None)


def environment(full_error: bool = False) -> dict[str, str]:
    """Ours, with the user's project on the path and without what a test runner may have set."""
    dropped = ("HYDRA_FULL_ERROR", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "WANDB_MODE")
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), env.get("PYTHONPATH")]))
    return env | ({"HYDRA_FULL_ERROR": "1"} if full_error else {})


def ranks_left() -> list[str]:
    """Command lines of processes that train.py started and that are still there."""
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if str(REPO / "train.py") in line]
