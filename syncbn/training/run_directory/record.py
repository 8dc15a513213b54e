"""What a run directory holds besides checkpoints and metrics, and the table that is printed from it at the end.

``config.yaml``  every setting as it was used        ``run.json``    identity, command, versions, git commit, status
``wandb.json``   the W&B run                      ``result.json`` what came out
"""

import json
import platform
import re
import secrets
import shutil
import subprocess
import sys
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

from syncbn.training.atomic_write import replacing
from syncbn.training.config.plan import Plan
from syncbn.training.config.schema import GROUPS
from syncbn.training.read_file import DamagedError, read_json, read_text
from syncbn.training.run_directory import lock
from syncbn.training.run_directory.kinds import lacks
from syncbn.training.run_directory.paths import run_of, short

NUMBERED = ("config.yaml", "result.json", "wandb.json", "error.txt", "ranks")  # each attempt has its own
TABLES = ("metrics.csv", "statistics.csv", "gradients.csv")  # of all attempts, unless one begins anew
PACKAGES = ("syncbn", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "torchmetrics", "numpy", "scikit-learn")


def begin(plan: Plan, run_id: str, overrides: list[str], begun_from: str | None = None) -> None:
    """Writes ``config.yaml`` and ``run.json``; what an earlier attempt in this directory wrote is kept, numbered.

    It may be killed anywhere: ``run.json`` is always there, and does not say ``finished`` once anything has been moved.
    Where a file cannot be written, everything is put back.

    Args:
        plan: of the run.
        run_id: its name.
        overrides: what the user has said.
        begun_from: the checkpoint that the user named; None keeps that of the earlier attempts.
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
    numbered = [*NUMBERED, *(TABLES if earlier != run_dir.resolve() else ())]  # else the tables go on
    try:
        if before:
            _keep(run_dir, before, last)
        for name in numbered:
            if (path := run_dir / name).exists():
                path.rename(_numbered(path, last))
        # The next number only now: after a kill before this, the rest is moved to the last.
        write(run_dir, "run", record)
        with replacing(run_dir / "config.yaml") as draft:
            OmegaConf.save(plan.settings(), draft)
    except OSError:
        _put_back(run_dir, last)
        raise


def _about(plan: Plan, overrides: list[str]) -> dict[str, Any]:
    """What does not depend on earlier attempts."""
    return {
        "command": [sys.executable, *sys.argv],
        "overrides": overrides,
        "world_size": plan.world_size,
        "normalization_batch": plan.normalization_batch,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": _git(),
    }


def mend(plan: Plan, run_id: str, overrides: list[str]) -> None:
    """Writes ``run.json`` and ``config.yaml`` again where a run that has finished with these settings has lost them."""
    run_dir = plan.run_dir
    if lacks("run", read(run_dir, "run")):
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


def take_back(run_dir: Path, *, refused: bool) -> bool:
    """Undoes :func:`begin` for an attempt that ended before it trained; whether it did.

    A run that had finished stays finished, with its results and settings. Any other run stays as it was where this
    attempt was refused: nothing was done with its settings.

    Args:
        run_dir: a run directory whose attempt has ended, and not finished.
        refused: its settings cannot work.
    """
    now = read(run_dir, "run")
    last = _attempt(run_dir, now) - 1
    before = read(run_dir, f"run-{last}")
    if now.get("trained") or not (before.get("status") == "finished" or (before and refused)):
        return False
    _put_back(run_dir, last)
    return True


def trains(run_dir: Path) -> None:
    """Notes that this attempt changes the run from now on."""
    write(run_dir, "run", recovered(run_dir) | {"trained": True})


def _put_back(run_dir: Path, last: int) -> None:
    """Renames what the attempt with this number had left; ``run.json`` comes last, and marks that it is done."""
    for path in [run_dir / name for name in (*NUMBERED, *TABLES)]:
        kept = _numbered(path, last)
        with suppress(OSError):  # as far as it goes: the disk may be read-only by now
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


def _keep(run_dir: Path, record: dict[str, Any], number: int) -> None:
    """Copies ``run.json``, for it marks a run directory, and takes back that the run has finished."""
    if damage(run_dir, "run"):
        (run_dir / "run.json").replace(run_dir / "damaged-run.json")
    if not (run_dir / f"run-{number}.json").exists():  # else the copy is of before it was taken back
        write(run_dir, f"run-{number}", record)
    write(run_dir, "run", record | {"attempt": number, "status": "running"})


def _wandb_id(run_id: str) -> str:
    """Of this run directory alone: W&B makes one of two runs with one id, also from another sweep, or long deleted."""
    if re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run_id):  # date, time and letters: made for this run
        return run_id
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", run_id)[:100]  # W&B takes no other names
    return f"{name}-{secrets.token_hex(3)}"


def end(run_dir: Path, status: str, **more: Any) -> None:
    """Writes how the run ended into ``run.json``: ``finished``, ``failed`` or ``interrupted``."""
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write(run_dir, "run", recovered(run_dir) | {"status": status, "ended": ended} | more)


def read(run_dir: Path, name: str) -> dict[str, Any]:
    """The contents of ``name.json`` in the run directory; empty where there is none, or it is damaged."""
    try:
        return read_json(run_dir / f"{name}.json")
    except (OSError, DamagedError):
        return {}


def damage(run_dir: Path, name: str) -> str:
    """What is wrong with ``name.json``, in one line with its path; empty where it is whole, or not there."""
    path = run_dir / f"{name}.json"
    try:
        missing = lacks(name, read_json(path))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{short(path, resolve=False)} cannot be read ({error.strerror})"
    except DamagedError as error:
        return f"{short(path, resolve=False)} {error.hint}"
    return f"{short(path, resolve=False)} is damaged (it has no {missing})" if missing else ""


def settings(run_dir: Path) -> DictConfig | None:
    """``config.yaml`` of a run; None where there is none.

    Raises:
        DamagedError: it cannot be read, or is not the settings of a run. One line, with its path.
    """
    path = run_dir / "config.yaml"
    try:
        text = read_text(path)
        found = OmegaConf.create(text)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedError(short(path, resolve=False), f"cannot be read ({error.strerror})") from error
    except DamagedError as error:
        raise DamagedError(short(path, resolve=False), error.hint) from error
    except (ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())[:100]
        raise DamagedError(short(path, resolve=False), f"is damaged ({said})") from error
    groups = [name for name in GROUPS if not isinstance(found, DictConfig) or not OmegaConf.is_dict(found.get(name))]
    if groups or not text.endswith("\n"):
        lacks = f"it has no {', '.join(groups)}" if groups else "its end is missing"
        raise DamagedError(short(path, resolve=False), f"is damaged ({lacks})")
    assert isinstance(found, DictConfig)
    return found


def recovered(run_dir: Path, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """``run.json``; where it is lost or damaged, what the rest of the run directory tells; empty where no run began.

    Args:
        run_dir: a run directory; there need be none.
        report: takes a line where something was recovered.
    """
    found = read(run_dir, "run")
    if found and not lacks("run", found):
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
    status = "finished" if not lacks("result", read(run_dir, "result")) else "running"
    return about | {"attempt": last + 1, "wandb_id": wandb_id, "status": status}


def status(run_dir: Path) -> str:
    """How a run ended. One that says ``running``, and that no process holds, was ``killed``."""
    about = read(run_dir, "run")
    if lacks("run", about):
        return "damaged" if damage(run_dir, "run") or (run_dir / "result.json").exists() else "failed"
    said = str(about["status"])
    if said == "interrupted" and about.get("requeued"):
        return "requeued"
    return "killed" if said == "running" and lock.is_held(run_dir) is False else said


def write(run_dir: Path, name: str, contents: dict[str, Any]) -> None:
    """Replaces ``name.json`` in the run directory, whole or not at all."""
    text = json.dumps(contents, indent=2) + "\n"
    with replacing(run_dir / f"{name}.json") as draft:
        draft.write_text(text, encoding="utf-8")


def monitored(run_dir: Path) -> float | None:
    """The best value of the monitored metric; None if it was never logged, and for a run that only tests."""
    return next(iter((read_whole(run_dir, "result").get("monitored") or {}).values()), None)


def read_whole(run_dir: Path, name: str) -> dict[str, Any]:
    """The contents of ``name.json``, empty where they lack something too."""
    found = read(run_dir, name)
    return {} if lacks(name, found) else found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _git() -> dict[str, Any] | None:
    """The commit of the working directory, and whether anything in it had changed since, when first asked."""
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
