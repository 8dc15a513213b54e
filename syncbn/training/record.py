"""What a run directory holds besides checkpoints and metrics, and the table that is printed from it at the end.

``config.yaml``  every setting as it was used        ``run.json``    identity, command, versions, git commit, status
``wandb.json``   the W&B run                      ``result.json`` what came out
"""

import json
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from syncbn.training import config, wandb_files
from syncbn.training.identity import run_of

PACKAGES = ("syncbn", "torch", "lightning", "hydra-core", "omegaconf", "wandb", "torchmetrics", "numpy", "scikit-learn")


def begin(cfg: DictConfig, run_dir: Path, run_id: str, overrides: list[str]) -> None:
    """Writes ``config.yaml`` and ``run.json``; what an earlier attempt in this directory wrote is kept, numbered."""
    before = read(run_dir, "run")
    earlier = None if cfg.ckpt_path is None else run_of(Path(cfg.ckpt_path))
    elsewhere = earlier is not None and earlier != run_dir.resolve()
    record = {
        "id": run_id,
        "wandb_id": read(earlier, "run")["wandb_id"] if elsewhere and earlier else before.get("wandb_id", run_id),
        "goes_on_from": str(earlier) if elsewhere else before.get("goes_on_from"),
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
    attempts = len(list(run_dir.glob("run-*.json"))) + 1
    numbered = ["config.yaml", "result.json", "wandb.json", "error.txt", "ranks"]
    if earlier != run_dir.resolve():  # else it goes on
        numbered.append("metrics.csv")
    for name in numbered:
        if (path := run_dir / name).exists():
            path.rename(path.with_stem(f"{path.stem}-{attempts}"))
    if (run_dir / "run.json").exists():  # copied, for it marks a run directory, which at no moment must look like none
        shutil.copy(run_dir / "run.json", run_dir / f"run-{attempts}.json")
    write(run_dir, "run", record)
    draft = run_dir / ".config.yaml"
    OmegaConf.save(cfg, draft)
    draft.replace(run_dir / "config.yaml")


def end(run_dir: Path, status: str, **more: Any) -> None:
    """Writes how the run ended into ``run.json``: ``finished``, ``failed`` or ``interrupted``."""
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    write(run_dir, "run", read(run_dir, "run") | {"status": status, "ended": ended} | more)


def read(run_dir: Path, name: str) -> dict[str, Any]:
    """The contents of ``name.json`` in the run directory; empty where there is none."""
    path = run_dir / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write(run_dir: Path, name: str, contents: dict[str, Any]) -> None:
    """Replaces ``name.json`` in the run directory, whole or not at all."""
    draft = run_dir / f".{name}.json"
    draft.write_text(json.dumps(contents, indent=2) + "\n")
    draft.rename(run_dir / f"{name}.json")


def headline(cfg: DictConfig) -> str:
    """One line that says what is about to run."""
    devices, nodes, norm = cfg.trainer.devices, cfg.trainer.num_nodes, cfg.norm
    ranks = f"{devices} {'process' if devices == 1 else 'processes'} on the {cfg.trainer.accelerator.upper()}"
    if nodes > 1:
        ranks = f"{nodes} nodes of {ranks}"
    share = ""
    if norm.name == "sync":
        share = f" over {norm.group}" if norm.ghost_batch is None else " in ghost batches"
    batch = config.normalization_batch(cfg)
    statistics = f"statistics of {batch} samples" if batch else "no batch statistics"
    return f"{ranks}, {cfg.data.batch_size} samples each; norm {norm.name}{share}: {statistics}"


def summary(run_dir: Path) -> Group:
    """What came out and where it lies, as a table, and the command that uploads it."""
    result, wandb = read(run_dir, "result"), read(run_dir, "wandb")
    table = Table(show_header=False, box=box.HORIZONTALS)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    test = result.get("test", {})
    if "test/acc" in test:
        table.add_row("test accuracy", f"{100 * test['test/acc']:.2f} % of {test['test/count']:.0f} samples")
    if "test/loss" in test:
        table.add_row("test loss", f"{test['test/loss']:.4f}")
    before = f", the first {result['epochs_before']} of them before" if result["epochs_before"] else ""
    table.add_row("training", f"{result['seconds']:.1f} s, {result['epochs']} epochs, {result['steps']} steps{before}")
    if result["images_per_second"]:
        table.add_row("speed", f"{result['images_per_second']:,.0f} images/s over all devices")
    table.add_row("run directory", short(run_dir))
    if result["checkpoint"]:
        table.add_row("best checkpoint", short(Path(result["checkpoint"])))
    if wandb:
        last = wandb_files.directories(run_dir)[-1]
        table.add_row("W&B run", wandb["url"] or str(last.relative_to(run_dir.resolve())))
    lines: list[RenderableType] = [table]
    options, directories = wandb_files.upload(run_dir)
    if directories:
        lines.append(f"upload it:  {' '.join([_program('wandb'), *options, *map(short, directories)])}")
    return Group(*lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """The commit of the working directory, and whether anything in it has changed since."""
    try:
        commit, status = (
            subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
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
