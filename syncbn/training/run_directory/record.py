"""Writes, reads and recovers the files of a run directory besides checkpoints and metrics.

``config.yaml``  every setting as it was used        ``run.json``    identity, command, versions, git commit, status
``wandb.json``   the W&B run                         ``result.json`` results of training and tests

An *attempt* is one execution of a run's command. A resumed run has several, whose files are kept with a number:
``run-1.json``.
"""

import json
import platform
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from syncbn.training import program
from syncbn.training.atomic_write import replacing
from syncbn.training.config.plan import Plan
from syncbn.training.config.schema import GROUPS
from syncbn.training.read_file import DamagedError, read_json, read_text
from syncbn.training.run_directory import lock
from syncbn.training.run_directory.kinds import missing_value
from syncbn.training.run_directory.paths import run_of, short

NUMBERED = ("config.yaml", "result.json", "wandb.json", "error.txt", "ranks")  # each attempt has its own
TABLES = ("metrics.csv", "statistics.csv", "gradients.csv")  # resumed attempts append; one that starts over does not
PACKAGES = ("syncbn", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "torchmetrics", "numpy", "scikit-learn")


def begin(plan: Plan, run_id: str, overrides: list[str], begun_from: str | None = None) -> None:
    """Writes ``config.yaml`` and ``run.json`` of a new attempt, and renames those of an earlier attempt.

    The process may be killed at any point: ``run.json`` always exists, and its status is no longer ``finished`` before
    the first file is renamed. If a file cannot be written, all files are renamed back.
    ``begun_from`` is the checkpoint of ``ckpt_path``; None keeps that of the earlier attempts.
    """
    run_dir = plan.run_dir
    before = recovered(run_dir)
    earlier = None if plan.checkpoint is None else run_of(Path(plan.checkpoint))
    elsewhere = earlier is not None and earlier != run_dir.resolve()
    last = _attempt(run_dir, before) if before else 0
    record = {
        "id": run_id,
        "attempt": last + 1,
        "wandb_id": before.get("wandb_id") or _wandb_id(run_id),
        "goes_on_from": str(earlier) if elsewhere else before.get("goes_on_from"),
        "begun_from": begun_from or before.get("begun_from"),
        "tests": plan.checkpoint if plan.cfg.get("mode") == "test" else None,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **_about(plan, overrides),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    numbered = [*NUMBERED, *(TABLES if earlier != run_dir.resolve() else ())]  # otherwise the tables are continued
    try:
        if before:
            _keep_record(run_dir, before, last)
        for name in numbered:
            if (path := run_dir / name).exists():
                path.rename(_numbered(path, last))
        # run.json gets the new number last: after a kill before this line the next attempt renames the remaining files.
        write(run_dir, "run", record)
        with replacing(run_dir / "config.yaml") as draft:
            OmegaConf.save(plan.settings(), draft)
    except OSError:
        _rename_back(run_dir, last)
        raise


def _about(plan: Plan, overrides: list[str]) -> dict[str, Any]:
    """The values of ``run.json`` that do not depend on earlier attempts."""
    return {
        "command": program.command_line(),
        "overrides": overrides,
        "world_size": plan.world_size,
        "normalization_batch": plan.normalization_batch,
        "versions": versions(),
        "git": _git(),
    }


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that a result depends on; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def repair(plan: Plan, run_id: str, overrides: list[str]) -> None:
    """Rewrites ``run.json`` and ``config.yaml`` of a finished run with these settings, if they are lost or damaged."""
    run_dir = plan.run_dir
    if missing_value("run", read(run_dir, "run")):
        about = _about(plan, overrides) | recovered(run_dir)
        if (run_dir / "run.json").exists():
            (run_dir / "run.json").replace(run_dir / "damaged-run.json")
        write(run_dir, "run", {"id": run_id} | about | {"wandb_id": about.get("wandb_id") or _wandb_id(run_id)})
    try:
        whole = settings(run_dir) is not None
    except DamagedError:
        whole = False
    if not whole:
        with replacing(run_dir / "config.yaml") as draft:
            OmegaConf.save(plan.settings(), draft)


def undo_begin(run_dir: Path, *, refused: bool) -> bool:
    """Undoes :func:`begin` for an attempt that failed before it trained.

    A run that had finished stays finished, with its results and settings. Any other run is restored if this attempt was
    refused, since nothing was done with the refused settings. Returns whether the attempt was undone.
    """
    now = read(run_dir, "run")
    last = _attempt(run_dir, now) - 1
    before = read(run_dir, f"run-{last}")
    if now.get("trained") or not (before.get("status") == "finished" or (before and refused)):
        return False
    _rename_back(run_dir, last)
    return True


def mark_trained(run_dir: Path) -> None:
    """Records that this attempt changes the run from now on, so that :func:`undo_begin` leaves it as it is."""
    write(run_dir, "run", recovered(run_dir) | {"trained": True})


def _rename_back(run_dir: Path, last: int) -> None:
    """Renames the files of the attempt with this number back; ``run.json`` last, which completes the undo."""
    for path in [run_dir / name for name in (*NUMBERED, *TABLES)]:
        kept = _numbered(path, last)
        with suppress(OSError):  # renames as many as possible: the disk may be read-only by now
            if kept.exists():
                if path.is_dir():
                    shutil.rmtree(path)
                kept.replace(path)
            elif not last and path.name == "config.yaml":
                path.unlink(missing_ok=True)
    with suppress(OSError):
        if last:
            (run_dir / f"run-{last}.json").replace(run_dir / "run.json")
        else:
            (run_dir / "run.json").unlink(missing_ok=True)


def _numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number}")


def _attempt(run_dir: Path, record: dict[str, Any]) -> int:
    """The number of the attempt that wrote this record."""
    number = record.get("attempt")
    return number if isinstance(number, int) else len(list(run_dir.glob("run-*.json"))) + 1


def _keep_record(run_dir: Path, record: dict[str, Any], number: int) -> None:
    """Copies ``run.json`` to its number, and sets the status of ``run.json`` itself to ``running``.

    It is copied and not renamed, because a directory without ``run.json`` is not recognized as a run directory.
    """
    if damage(run_dir, "run"):
        (run_dir / "run.json").replace(run_dir / "damaged-run.json")
    # An existing copy was made by an attempt that was killed during this. It has the status from before that attempt.
    if not (run_dir / f"run-{number}.json").exists():
        write(run_dir, f"run-{number}", record)
    write(run_dir, "run", record | {"attempt": number, "status": "running"})


def _wandb_id(run_id: str) -> str:
    """A W&B id that no other run directory has.

    W&B merges two runs with the same id, even if one is of another sweep or was deleted long ago.
    """
    if re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run_id):  # a generated id is unique already
        return run_id
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run_id)[:100]  # W&B accepts no other characters
    return f"{name}-{secrets.token_hex(3)}"


def end(run_dir: Path, status: str, **more: Any) -> None:
    """Writes the status of an ended run into ``run.json``: ``finished``, ``failed`` or ``interrupted``."""
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write(run_dir, "run", recovered(run_dir) | {"status": status, "ended": ended} | more)


def read(run_dir: Path, name: str) -> dict[str, Any]:
    """The contents of ``name.json`` in the run directory; empty if the file is missing or damaged."""
    try:
        return read_json(run_dir / f"{name}.json")
    except (OSError, DamagedError):
        return {}


def damage(run_dir: Path, name: str) -> str:
    """What is wrong with ``name.json``, in one line with its path; empty if the file is intact or missing."""
    path = run_dir / f"{name}.json"
    try:
        missing = missing_value(name, read_json(path))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{short(path, resolve=False)} cannot be read ({error.strerror})"
    except DamagedError as error:
        return f"{short(path, resolve=False)} {error.hint}"
    return f"{short(path, resolve=False)} is damaged (it has no {missing})" if missing else ""


def settings(run_dir: Path) -> DictConfig | None:
    """Reads ``config.yaml`` of a run; None if it is missing.

    Raises:
        DamagedError: the file cannot be read, or does not contain the settings of a run. One line, with its path.
    """
    path = run_dir / "config.yaml"
    cause: Exception | None = None
    try:
        text = read_text(path)
        found = OmegaConf.create(text)
    except FileNotFoundError:
        return None
    except OSError as error:
        wrong, cause = f"cannot be read ({error.strerror})", error
    except DamagedError as error:
        wrong, cause = error.hint, error
    except (ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        wrong, cause = f"is damaged ({' '.join(str(error).split())[:100]})", error
    else:
        groups = [n for n in GROUPS if not isinstance(found, DictConfig) or not OmegaConf.is_dict(found.get(n))]
        if not groups and text.endswith("\n"):
            assert isinstance(found, DictConfig)
            return found
        wrong = f"is damaged (it has no {', '.join(groups)})" if groups else "is damaged (its end is missing)"
    raise DamagedError(short(path, resolve=False), wrong) from cause


def recovered(run_dir: Path, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Reads ``run.json``, or recovers it from the other files if it is lost or damaged, which is reported.

    Returns:
        The contents; empty if no run has begun in this directory, which need not exist.
    """
    found = read(run_dir, "run")
    if found and not missing_value("run", found):
        return found
    wrong = damage(run_dir, "run")
    try:
        before = settings(run_dir)
    except DamagedError:
        before = None
    if not (wrong or before or (run_dir / "result.json").exists() or list(run_dir.glob("checkpoints/*.ckpt"))):
        return {}
    report(f"{wrong or short(run_dir / 'run.json', resolve=False) + ' is missing'}: recovered from the other files")
    attempts = {int(path.stem[4:]): path.stem for path in run_dir.glob("run-*.json") if path.stem[4:].isdecimal()}
    last = max(attempts, default=0)
    about = read(run_dir, attempts[last]) if last else {}
    named = None if before is None else before.get("ckpt_path")
    if not about and before is not None and named:
        if before.get("mode") == "test":
            about["tests"] = named
        elif run_of(Path(named)) != run_dir.resolve():
            about["begun_from"] = named
    wandb_id = about.get("wandb_id") or read(run_dir, "wandb").get("id")
    status = "finished" if not missing_value("result", read(run_dir, "result")) else "running"
    return about | {"attempt": last + 1, "wandb_id": wandb_id, "status": status}


def status(run_dir: Path) -> str:
    """The status of a run. A run with the status ``running`` whose lock no process holds was ``killed``."""
    about = read(run_dir, "run")
    if missing_value("run", about):
        return "damaged" if damage(run_dir, "run") or (run_dir / "result.json").exists() else "failed"
    recorded = str(about["status"])
    if recorded == "interrupted" and about.get("requeued"):
        return "requeued"
    return "killed" if recorded == "running" and lock.is_held(run_dir) is False else recorded


def write(run_dir: Path, name: str, contents: dict[str, Any]) -> None:
    """Replaces ``name.json`` in the run directory atomically."""
    text = json.dumps(contents, indent=2) + "\n"
    with replacing(run_dir / f"{name}.json") as draft:
        draft.write_text(text, encoding="utf-8")


def monitored(run_dir: Path) -> float | None:
    """The best value of the monitored metric; None if it was never logged, or the run only tests."""
    return next(iter((read_whole(run_dir, "result").get("monitored") or {}).values()), None)


def read_whole(run_dir: Path, name: str) -> dict[str, Any]:
    """The contents of ``name.json``; empty if the file is missing, damaged or lacks a value."""
    found = read(run_dir, name)
    return {} if missing_value(name, found) else found


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _git() -> dict[str, Any] | None:
    """The git commit of the working directory and whether it has uncommitted changes, at the first call."""
    try:
        commit, status = (
            subprocess.run(
                ["git", *arguments], capture_output=True, check=True, timeout=10, encoding="utf-8", errors="replace"
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(status)}
