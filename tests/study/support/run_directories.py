"""Writes run directories as train.py does, with known numbers and without training."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

NORMS = {
    "local": {"name": "local"},
    "local_mean": {"name": "local_mean"},
    "none": {"name": "none"},
    "sync": {"name": "sync", "group": "world", "batch_size": None, "ghost_batch": None, "only": None},
    "group_norm": {"name": "group_norm", "num_groups": 32, "min_channels": 16},
}
VERSIONS = {"python": "3.11.7", "syncbn": "0.1.0", "torch": "2.13.0", "lightning": "2.6.6", "numpy": "2.4.6"}


def run(
    directory: Path,
    *,
    norm: str | Mapping[str, Any] = "local",
    seed: int = 0,
    error: float | None = 2.0,
    status: str = "finished",
    batch_size: int = 2,
    devices: int = 2,
    simulate: int | None = None,
    settings: Mapping[str, Any] | None = None,
    test: Mapping[str, float] | None = None,
    precise_error: float | None = None,
    images_per_second: float = 400.0,
    collectives: float | None = None,
    curve: Sequence[float] = (30.0, 10.0, 5.0),
    layers: Sequence[Mapping[str, Any]] = (),
    ended: str = "2026-01-01T00:10:00+00:00",
    versions: Mapping[str, str] | None = None,
    tests: str | None = None,
) -> Path:
    """Writes one run directory.

    Args:
        directory: it; made with its parents.
        norm: a name in ``NORMS``, or all of ``norm``.
        seed: of the run.
        error: the test error in percent; None where there is no result.
        status: as in ``run.json``.
        batch_size: per device.
        devices: processes; 1 where ``simulate`` is given.
        simulate: the devices that one process stands for.
        settings: others, by dotted names: ``{"optimizer.lr": 0.1}``.
        test: metrics of the test besides ``test/acc``, ``test/loss`` and ``test/count``, or in their place.
        precise_error: the same error with population statistics, where it was measured.
        images_per_second: over all devices.
        collectives: their share of the time, 0 to 1.
        curve: validation error in percent by epoch; the training loss is a tenth of it.
        layers: rows of ``statistics.csv``, all columns or those that :func:`layer` fills.
        ended: time in ISO 8601; a later one is the newer run.
        versions: of packages, besides ``VERSIONS`` or in their place.
        tests: the checkpoint that it tests, where it does nothing else.
    """
    processes = 1 if simulate else devices
    norm = NORMS[norm] if isinstance(norm, str) else dict(norm)
    config = _config(norm, seed, batch_size, simulate or devices, processes, len(curve), directory)
    config["simulate"] = simulate
    for name, value in (settings or {}).items():
        _put(config, name, value)
    shares = {"none": None, "group_norm": None, "sync": batch_size * (simulate or devices)}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    about = {
        "id": directory.name,
        "attempt": 1,
        "status": status,
        "started": "2026-01-01T00:00:00+00:00",
        "command": ["python", "train.py", f"norm={norm['name']}", f"seed={seed}"],
        "overrides": [f"norm={norm['name']}", f"seed={seed}"],
        "world_size": processes,
        "normalization_batch": shares.get(norm["name"], batch_size),
        "versions": {**VERSIONS, **(versions or {})},
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "begun_from": tests,
        "tests": tests,
    }
    _json(directory / "run.json", about if status == "running" else about | {"ended": ended})
    if error is not None:
        count = {"test/count": 360.0}
        result: dict[str, Any] = {
            "seconds": 10.0,
            "epochs": len(curve),
            "steps": 100 * len(curve),
            "epochs_before": 0,
            "images_per_second": images_per_second,
            "checkpoint": None,
            "test": {"test/loss": error / 10, "test/acc": 1 - error / 100, **count, **(test or {})},
        }
        if precise_error is not None:
            result["precise"] = {"precise/acc": 1 - precise_error / 100, "precise/loss": precise_error / 10}
        if collectives is not None:
            result["collectives"] = {"seconds_per_step": 0.001, "share": collectives}
        _json(directory / "result.json", result)
    _metrics(directory / "metrics.csv", curve)
    if layers:
        columns = list(layer("").keys())
        rows = [",".join(str(row[column]) for column in columns) for row in layers]
        (directory / "statistics.csv").write_text("\n".join([",".join(columns), *rows]) + "\n", encoding="utf-8")
    return directory


def sweep(directory: Path, errors: Mapping[str, Mapping[int, float]], **options: Any) -> Path:
    """A sweep's directory: a run each in ``0``, ``1``, ... after those that are there; ``{norm: {seed: error}}``."""
    number = len(list(directory.glob("[0-9]*")))
    for norm, by_seed in errors.items():
        for seed, error in by_seed.items():
            run(directory / str(number), norm=norm, seed=seed, error=error, **options)
            number += 1
    return directory


def copies(directory: Path, number: int) -> list[Path]:
    """Run directories in sweeps of 100, which differ in the learning rate and in their paths."""
    names = ("config.yaml", "run.json", "result.json")
    first = run(directory / "sweep0" / "0")
    texts = {name: (first / name).read_text(encoding="utf-8") for name in names}
    made = [directory / f"sweep{each // 100}" / str(each % 100) for each in range(number)]
    for each, path in enumerate(made[1:], start=1):
        path.mkdir(parents=True)
        for name, text in texts.items():
            changed = text.replace("lr: 0.05", f"lr: {each / number}").replace(str(first), str(path))
            (path / name).write_text(changed, encoding="utf-8")
    return made


def by_seed(errors: Iterable[float]) -> dict[int, float]:
    """Errors of the seeds 0, 1, ..."""
    return dict(enumerate(errors))


def layer(name: str, *, step: int = 10, **figures: float) -> dict[str, Any]:
    """A row of ``statistics.csv``: a layer of 2 values on each of 2 devices that differ as chance has it."""
    row = {"step": step, "layer": name, "device_batch": 2, "group_batch": 4, "spread": 1.0, "effective_batch": 2.0}
    return row | {"variance_ratio": 0.67, "seconds": 0.0002} | figures


def damage(path: Path) -> None:
    """Truncates a file to its first half, as a full disk can."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: len(text) // 2], encoding="utf-8")


def _config(
    norm: Mapping[str, Any], seed: int, batch_size: int, devices: int, processes: int, epochs: int, directory: Path
) -> dict[str, Any]:
    model = {"_target_": "syncbn.training.MLP", "in_features": 64, "num_classes": 10, "depth": 4, "width": 64}
    optimizer = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005}
    scheduler = {"_target_": "syncbn.training.Cosine", "_partial_": True, "epochs": epochs, "final": 0.0}
    module = {"_target_": "syncbn.training.Classifier", "network": dict(model), "optimizer": dict(optimizer)}
    checkpoint = {"monitor": "val/acc", "mode": "max", "filename": "best", "dirpath": str(directory / "checkpoints")}
    data = {"_target_": "syncbn.training.Digits", "batch_size": batch_size, "global_batch_size": batch_size * devices}
    trainer = {"accelerator": "cpu", "devices": processes, "num_nodes": 1, "max_epochs": epochs}
    return {
        "data": {**data, "split_seed": 0, "shuffle": True, "seed": seed, "num_workers": 0, "remainder": "drop"},
        "model": model,
        "norm": dict(norm),
        "module": {**module, "scheduler": dict(scheduler), "num_classes": 10, "label_smoothing": 0.0},
        "optimizer": optimizer,
        "scheduler": scheduler,
        "trainer": {**trainer, "precision": "32-true", "log_every_n_steps": 10, "accumulate_grad_batches": 1},
        "logger": {"name": "csv"},
        "callbacks": {"checkpoint": checkpoint, "learning_rate": {"logging_interval": "step"}},
        "seed": seed,
        "run": {"id": None},
        "resume": {"every_n_steps": None, "every_n_minutes": 10.0, "keep": 2},
        "timeouts": {"collective": 600.0, "stop": 120.0},
        "cluster": {"name": "local", "requeue": False},
        "ckpt_path": None,
        "test": True,
    }


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    *groups, last = name.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    tree[last] = value


def _metrics(path: Path, curve: Sequence[float]) -> None:
    lines = ["epoch,step,train/loss,val/acc,val/loss"]
    for epoch, error in enumerate(curve):
        step = 100 * (epoch + 1) - 1
        lines += [f"{epoch},{step},,{1 - error / 100},{error / 10}", f"{epoch},{step},{error / 10},,"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _json(path: Path, contents: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
