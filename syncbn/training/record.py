"""What a run directory holds besides checkpoints and metrics, and the table that is printed from it at the end.

``config.yaml``  every setting as it was used        ``run.json``    identity, command, versions, git commit, status
``wandb.json``   the W&B run                      ``result.json`` what came out
"""

import json
import platform
import re
import secrets
import shlex
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
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from yaml import YAMLError

from syncbn.training import config, identity, wandb_files
from syncbn.training.console import cell
from syncbn.training.files import DamagedError, read_json, read_text, replacing
from syncbn.training.identity import real, run_of
from syncbn.training.kinds import lacks
from syncbn.training.schema import GROUPS

NUMBERED = ("config.yaml", "result.json", "wandb.json", "error.txt", "ranks")  # each attempt has its own
TABLES = ("metrics.csv", "statistics.csv", "gradients.csv")  # of all attempts, unless one begins anew
PACKAGES = ("syncbn", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "torchmetrics", "numpy", "scikit-learn")


def begin(cfg: DictConfig, run_dir: Path, run_id: str, overrides: list[str], begun_from: str | None = None) -> None:
    """Writes ``config.yaml`` and ``run.json``; what an earlier attempt in this directory wrote is kept, numbered.

    It may be killed anywhere: ``run.json`` is always there, and does not say ``finished`` once anything has been moved.
    Where a file cannot be written, everything is put back.

    Args:
        cfg: settled settings.
        run_dir: the run directory.
        run_id: its name.
        overrides: what the user has said.
        begun_from: the checkpoint that the user named; None keeps that of the earlier attempts.
    """
    before = recovered(run_dir)
    earlier = None if cfg.ckpt_path is None else run_of(Path(cfg.ckpt_path))
    elsewhere = earlier is not None and earlier != run_dir.resolve()
    last = _attempt(run_dir, before) if before else 0
    record = {
        "id": run_id,
        "attempt": last + 1,
        "wandb_id": before.get("wandb_id") or _wandb_id(run_id),
        "goes_on_from": str(earlier) if elsewhere else before.get("goes_on_from"),
        "begun_from": begun_from or before.get("begun_from"),
        "tests": cfg.ckpt_path if cfg.get("mode") == "test" else None,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **_about(cfg, overrides),
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
            OmegaConf.save(cfg, draft)
    except OSError:
        _put_back(run_dir, last)
        raise


def _about(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """What does not depend on earlier attempts."""
    return {
        "command": [sys.executable, *sys.argv],
        "overrides": overrides,
        "world_size": config.world_size(cfg),
        "normalization_batch": config.normalization_batch(cfg),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": _git(),
    }


def mend(cfg: DictConfig, run_dir: Path, run_id: str, overrides: list[str]) -> None:
    """Writes ``run.json`` and ``config.yaml`` again where a run that has finished with these settings has lost them."""
    if lacks("run", read(run_dir, "run")):
        about = _about(cfg, overrides) | recovered(run_dir)
        if (run_dir / "run.json").exists():
            (run_dir / "run.json").replace(run_dir / "damaged-run.json")
        write(run_dir, "run", {"id": run_id} | about | {"wandb_id": about.get("wandb_id") or _wandb_id(run_id)})
    try:
        whole = settings(run_dir) is not None
    except DamagedError:
        whole = False
    if not whole:
        with replacing(run_dir / "config.yaml") as draft:
            OmegaConf.save(cfg, draft)


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
        return f"{short(path, resolve=False)} {error}"
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
        raise DamagedError(f"{short(path, resolve=False)} cannot be read ({error.strerror})") from error
    except DamagedError as error:
        raise DamagedError(f"{short(path, resolve=False)} {error}") from error
    except (ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())[:100]
        raise DamagedError(f"{short(path, resolve=False)} is damaged ({said})") from error
    groups = [name for name in GROUPS if not isinstance(found, DictConfig) or not OmegaConf.is_dict(found.get(name))]
    if groups or not text.endswith("\n"):
        lacks = f"it has no {', '.join(groups)}" if groups else "its end is missing"
        raise DamagedError(f"{short(path, resolve=False)} is damaged ({lacks})")
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
    return "killed" if said == "running" and identity.is_held(run_dir) is False else said


def write(run_dir: Path, name: str, contents: dict[str, Any]) -> None:
    """Replaces ``name.json`` in the run directory, whole or not at all."""
    text = json.dumps(contents, indent=2) + "\n"
    with replacing(run_dir / f"{name}.json") as draft:
        draft.write_text(text, encoding="utf-8")


def headline(cfg: DictConfig) -> str:
    """One line that says what is about to run."""
    devices, nodes, norm = cfg.trainer.devices, cfg.trainer.num_nodes, cfg.norm
    ranks = f"{devices} {'process' if devices == 1 else 'processes'} on the {cfg.trainer.accelerator.upper()}"
    if cfg.get("simulate"):
        ranks = f"{ranks} for {cfg.simulate} devices"
    if nodes > 1:
        ranks = f"{nodes} nodes of {ranks}"
    adapts = _adapts(cfg) if cfg.get("adapt") is not None else ""
    if cfg.get("mode") == "test":
        return f"{ranks}, {cfg.data.batch_size} samples each; tests {short(Path(cfg.ckpt_path))}{adapts}"
    share = ""
    if norm.get("ghost_batch") is not None:
        share = " in ghost batches"
    elif norm.name in ("sync", "torch_sync"):
        share = f" over {norm.get('group', 'world')}"
    batch = config.normalization_batch(cfg)
    statistics = f"statistics of {batch} samples" if batch else "no batch statistics"
    return f"{ranks}, {cfg.data.batch_size} samples each; norm {norm.name}{share}: {statistics}{adapts}"


def _adapts(cfg: DictConfig) -> str:
    """To how many samples batch norm adapts in the test, and what training's statistics count for beside them."""
    prior = cfg.adapt.get("prior", 16)
    to = "all samples so far" if cfg.adapt.get("streaming") else f"batches of {config.adaptation_batch(cfg)}"
    return f"; in the test batch norm adapts to {to}, with a prior of {prior:g}"


def summary(run_dir: Path) -> Group:
    """What came out and where it lies, as a table, and the command that uploads it.

    A run of an earlier version has perhaps not all of it, one that was ended by ``sys.exit`` no result.
    """
    result, wandb, about = _whole(run_dir, "result"), read(run_dir, "wandb"), _whole(run_dir, "run")
    try:
        rows = _came_out(result) if result else [("result", "none: a rank ended by sys.exit before the end")]
    except (TypeError, ValueError, AttributeError, KeyError):  # names that are known, with values that are not numbers
        result = {}
    if not result and damage(run_dir, "result"):
        rows = [("result", f"{short(run_dir / 'result.json')} is damaged")]
    if tested := about.get("tests"):
        rows.append(("checkpoint tested", short(Path(tested))))
    rows.append(("run directory", short(run_dir)))
    if result.get("checkpoint"):
        rows.append(("best checkpoint", short(Path(result["checkpoint"]))))
    elif result.get("tested") == "final weights":
        rows.append(("tested", "the weights at the end of training: there is no best checkpoint"))
    attempts = wandb_files.directories(run_dir) if wandb else []
    if wandb.get("url") or attempts:  # its directories may have been removed
        rows.append(("W&B run", wandb.get("url") or str(attempts[-1].relative_to(run_dir.resolve()))))
    table = Table(show_header=False, box=box.HORIZONTALS)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    for label, value in rows:
        table.add_row(label, cell(value))
    lines: list[RenderableType] = [table]
    options, directories = wandb_files.upload(run_dir)
    if directories:
        command = shlex.join([_program("wandb"), *options, *map(short, directories)])
        lines.append(cell(f"upload it:  {command}"))
    return Group(*lines)


def monitored(run_dir: Path) -> float | None:
    """The best value of the monitored metric; None if it was never logged, and for a run that only tests."""
    return next(iter((_whole(run_dir, "result").get("monitored") or {}).values()), None)


def _whole(run_dir: Path, name: str) -> dict[str, Any]:
    """The contents of ``name.json``, empty where they lack something too."""
    found = read(run_dir, name)
    return {} if lacks(name, found) else found


def _came_out(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table that say what a result says."""
    rows = []
    test = result.get("test", {})
    if "test/acc" in test:
        of = f" of {test['test/count']:.0f} samples" if "test/count" in test else ""
        rows.append(("test accuracy", f"{100 * test['test/acc']:.2f} %{of}"))
    if "test/loss" in test:
        rows.append(("test loss", f"{test['test/loss']:.4f}"))
    fit = result.get("fit", {})
    if "fit/acc" in fit:
        rows.append(("training images", f"{100 * fit['fit/acc']:.2f} % of them known"))
    precise = result.get("precise", {})
    if "precise/acc" in precise:
        rows.append(("precise accuracy", f"{100 * precise['precise/acc']:.2f} % with population statistics"))
    corrupted, adapted = result.get("corrupted", {}), result.get("adapted", {})
    if "corrupted/acc" in corrupted:
        better = f", {100 * adapted['adapted/acc']:.2f} % with adapted statistics" if "adapted/acc" in adapted else ""
        rows.append(("corrupted accuracy", f"{100 * corrupted['corrupted/acc']:.2f} %{better}"))
    forms = {"seconds": "{:.1f} s", "epochs": "{} epochs", "steps": "{} steps"}
    training = [form.format(result[name]) for name, form in forms.items() if name in result]
    if before := result.get("epochs_before"):
        first = "the first epoch" if before == 1 else f"the first {before} epochs"
        training.append("all of them before" if before == result.get("epochs") else f"{first} before")
    if result.get("diverged"):
        training.append("ended by a loss or weights that are not finite")
    if target := result.get("target"):
        took = f"{target['target/steps']} steps"
        took += f", {target['target/seconds']:.1f} s" if "target/seconds" in target else ""
        rows.append(("target", f"{'reached after' if target['target/reached'] else 'not reached in'} {took}"))
    if training:
        rows.append(("training", ", ".join(training)))
    if speed := result.get("images_per_second"):
        rows.append(("speed", f"{speed:,.0f} images/s over all devices"))
    return rows


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


def short(path: Path, *, resolve: bool = True) -> str:
    """Relative to the working directory where it lies below it."""
    path, here = real(path) if resolve else path, Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _program(name: str) -> str:
    """A command as the user can type it: by its name, or, outside an activated environment, by its path."""
    return name if shutil.which(name) else short(Path(sys.executable).parent / name, resolve=False)
