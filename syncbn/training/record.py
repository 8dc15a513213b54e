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
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from syncbn.training import config, wandb_files
from syncbn.training.files import replacing
from syncbn.training.identity import run_of

PACKAGES = ("syncbn", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "torchmetrics", "numpy", "scikit-learn")


def begin(cfg: DictConfig, run_dir: Path, run_id: str, overrides: list[str]) -> None:
    """Writes ``config.yaml`` and ``run.json``; what an earlier attempt in this directory wrote is kept, numbered.

    It may be killed anywhere: ``run.json`` is always there, and does not say ``finished`` once anything has been moved.
    """
    before = read(run_dir, "run")
    earlier = None if cfg.ckpt_path is None else run_of(Path(cfg.ckpt_path))
    elsewhere = earlier is not None and earlier != run_dir.resolve()
    last = before.get("attempt", len(list(run_dir.glob("run-*.json"))) + 1) if before else 0
    record = {
        "id": run_id,
        "attempt": last + 1,
        "wandb_id": before.get("wandb_id") or _wandb_id(run_id),
        "goes_on_from": str(earlier) if elsewhere else before.get("goes_on_from"),
        "tests": cfg.ckpt_path if cfg.get("mode") == "test" else None,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "overrides": overrides,
        "world_size": config.world_size(cfg),
        "normalization_batch": config.normalization_batch(cfg),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git": _git(),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    numbered = ["config.yaml", "result.json", "wandb.json", "error.txt", "ranks"]
    if earlier != run_dir.resolve():  # else it goes on
        numbered += ["metrics.csv", "statistics.csv", "gradients.csv"]
    if before:
        _keep(run_dir, before, last)
    for name in numbered:
        if (path := run_dir / name).exists():
            path.rename(path.with_stem(f"{path.stem}-{last}"))
    write(run_dir, "run", record)  # the next number only now: after a kill before this, the rest is moved to the last
    with replacing(run_dir / "config.yaml") as draft:
        OmegaConf.save(cfg, draft)


def _keep(run_dir: Path, record: dict[str, Any], number: int) -> None:
    """Copies ``run.json``, for it marks a run directory, and takes back that the run has finished."""
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
    write(run_dir, "run", read(run_dir, "run") | {"status": status, "ended": ended} | more)


def read(run_dir: Path, name: str) -> dict[str, Any]:
    """The contents of ``name.json`` in the run directory; empty where there is none."""
    path = run_dir / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


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
    result, wandb = read(run_dir, "result"), read(run_dir, "wandb")
    rows = _came_out(result) if result else [("result", "none: a rank ended by sys.exit before the end")]
    if tested := read(run_dir, "run").get("tests"):
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
        table.add_row(label, Text(value))  # as it is: a path may have brackets, which are rich's markup
    lines: list[RenderableType] = [table]
    options, directories = wandb_files.upload(run_dir)
    if directories:
        command = shlex.join([_program("wandb"), *options, *map(short, directories)])
        lines.append(Text(f"upload it:  {command}"))
    return Group(*lines)


def monitored(run_dir: Path) -> float | None:
    """The best value of the monitored metric; None if it was never logged, and for a run that only tests."""
    found = read(run_dir, "result").get("monitored") or {}
    return next(iter(found.values()), None)


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
    path, here = path.resolve() if resolve else path, Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _program(name: str) -> str:
    """A command as the user can type it: by its name, or, outside an activated environment, by its path."""
    return name if shutil.which(name) else short(Path(sys.executable).parent / name, resolve=False)
