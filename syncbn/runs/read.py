"""Reads one run directory for the list: status, settings and metrics. A damaged one is a row like the others."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from syncbn.runs.config_blocks import ConfigBlocks, Flat
from syncbn.runs.find import Found
from syncbn.training.read_file import DamagedError, read_bytes, read_json, read_text
from syncbn.training.run_directory import lock
from syncbn.training.run_directory.kinds import missing_value

# The rank that lost a connection waited for another one, whose error is the cause.
VICTIM = re.compile("gloo|NCCL|Socket|Connection (closed|reset)")
MODULE = re.compile(r"^(\w+\.)+(?=\w+(:|$))")  # of the exception's class
ERROR_LENGTH = 600
# Settings that a run which only tests a checkpoint does not use.
OF_TRAINING = ("optimizer.", "scheduler.", "averaging.", "early_stopping.", "trainer.max_", "trainer.min_", "resume.")


@dataclass
class Run:
    """One row of the list.

    Attributes:
        path: of the directory, as it was found.
        status: "finished", "failed", "interrupted" (stopped by a signal), "requeued" (by Slurm), "running", "killed"
            (it says "running", but no process holds its lock), "damaged" (a file is), or "unreadable" (no permission).
        error: why it failed or cannot be read; "" where that is not known.
        started: time in ISO 8601, UTC; "" if it is not known.
        ended: likewise.
        tests: the checkpoint that it tests, if it does nothing else.
        settings: by dotted name; empty if they cannot be read.
        numbers: of ``result.json``, by name.
        best: names of the monitored metrics among them.
    """

    path: str
    status: str
    error: str = ""
    started: str = ""
    ended: str = ""
    tests: str = ""
    settings: Flat = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    best: tuple[str, ...] = ()

    @property
    def when(self) -> str:
        """The local time of the start, ``2026-01-31 23:59:59``; "" if it is not known."""
        try:
            return datetime.fromisoformat(self.started).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        except (ValueError, OverflowError):
            return ""


def read(found: Found, blocks: ConfigBlocks) -> Run:
    """Reads a run directory. Nothing in it is changed, and no lock is taken that a run could wait for."""
    path = Path(found.path)
    if found.error:
        return Run(found.path, "unreadable", found.error)
    about, wrong = _json(path, "run", found)
    result, wrong_result = _json(path, "result", found)
    run = Run(found.path, *_status(path, found, about, wrong, wrong_result))
    run.started, run.ended = str(about.get("started") or ""), str(about.get("ended") or "")
    run.tests = str(about.get("tests") or "")
    run.numbers, run.best = numbers(result), tuple(result.get("monitored") or ())
    if "config.yaml" in found.names:
        try:
            run.settings = blocks.flat(read_text(path / "config.yaml"))
            if run.tests:
                run.settings = {name: each for name, each in run.settings.items() if not name.startswith(OF_TRAINING)}
        except OSError as error:
            run.error = run.error or f"config.yaml: {error.strerror}"
        except ValueError as error:
            run.error = run.error or f"config.yaml {_hint(error)}"
    return run


def _json(path: Path, name: str, found: Found) -> tuple[dict[str, Any], str]:
    """The contents of ``name.json`` and what is wrong with it."""
    if f"{name}.json" not in found.names:
        return {}, ""
    try:
        contents = read_json(path / f"{name}.json")
    except OSError as error:
        return {}, f"{name}.json: {error.strerror}"
    except DamagedError as error:
        return {}, f"{name}.json {error.hint}"
    if missing := missing_value(name, contents):
        return {}, f"{name}.json is damaged (it has no {missing})"
    return contents, ""


def _status(path: Path, found: Found, about: dict[str, Any], wrong: str, wrong_result: str) -> tuple[str, str]:
    """The status of a run, and its error."""
    if wrong:
        return "damaged", wrong
    if not about:
        if "result.json" in found.names or "checkpoints" in found.names:
            return "damaged", "run.json is missing"
        return "failed", "there is no run.json: it failed before training began, or has just started"
    status = str(about["status"])
    if status == "running":
        # Only of a run that says so: the check takes a shared lock for a moment, and lock.hold() tries again.
        return ("killed" if lock.is_held(path) is False else "running"), ""
    if status == "interrupted" and about.get("requeued"):
        return "requeued", ""
    if status == "finished":
        return ("damaged", wrong_result) if wrong_result else (status, "")
    return status, _last_error(path, found) if status == "failed" else ""


def _last_error(path: Path, found: Found) -> str:
    """The exception in ``error.txt``, which holds the tracebacks of the ranks; "" if there is none."""
    if "error.txt" not in found.names:
        return ""
    try:
        text = read_bytes(path / "error.txt").decode("utf-8", "replace")
    except (OSError, DamagedError):
        return ""
    ranks = [each.strip().splitlines()[-1].strip() for each in re.split(r"(?m)^rank \d+$", text) if each.strip()]
    cause = next((line for line in ranks if not VICTIM.search(line)), ranks[0] if ranks else "")
    return MODULE.sub("", cause)[:ERROR_LENGTH]


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """All numbers of ``result.json``: ``seconds``, and those of its sections that are metrics, ``test/acc``."""
    found = {name: value for name, value in result.items() if not isinstance(value, dict)}
    for part in result.values():
        if isinstance(part, dict):
            found |= {name: value for name, value in part.items() if "/" in name}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _hint(error: ValueError) -> str:
    return error.hint if isinstance(error, DamagedError) else f"is damaged ({error})"
