"""Runs of a training in which everything that can be forgotten matters, with faults; and whether two ended alike."""

import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from syncbn.training.loggers.csv_logger import read
from tests.training.support.train_command import PROJECT, Run, handles_signals, train

EPOCHS, BATCHES = 3, 18
SETTINGS = (
    "model=faulty",
    "module=faulty",
    "data=faulty",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.log_every_n_steps=1",
)


def faulty(where: Path, *overrides: str, logger: str = "csv", **options: Any) -> Run:
    return train(where, "--config-dir", f"{PROJECT}/conf", *SETTINGS, f"logger={logger}", *overrides, **options)


def fault(where: Path, what: str, **arguments: Any) -> str:
    """The override that makes it happen, once."""
    more = "".join(f", {name}: {value}" for name, value in arguments.items())
    return f"+callbacks.fault={{_target_: faults.Fault, what: {what}, once: {where / 'once'}{more}}}"


@dataclass
class Draw:
    """Where SIGKILL hits everything, and in which run."""

    workers: int
    ranks: int
    every_n_steps: int
    at: dict[str, Any]

    def __str__(self) -> str:
        where = ", ".join(f"{name} {value}" for name, value in self.at.items())
        return f"{self.ranks} ranks, {self.workers} workers, a checkpoint every {self.every_n_steps} steps; at {where}"


WHERE = (
    *("the first step", "an epoch's last batch", "validation", "an epoch's end", "the test", "a step", "a save"),
    "any moment",
)


def draw(source: random.Random, where: str, workers: int, ranks: int) -> Draw:
    epoch, batch = source.randrange(EPOCHS), source.randrange(BATCHES)
    hook = source.choice(["on_train_batch_start", "on_train_batch_end"])
    at = {
        "the first step": {"hook": hook, "epoch": 0, "batch": 0},
        "an epoch's last batch": {"hook": hook, "epoch": epoch, "batch": BATCHES - 1},
        "validation": {"hook": "on_validation_batch_end", "epoch": epoch, "batch": source.randrange(4)},
        "an epoch's end": {"hook": "on_train_epoch_end", "epoch": epoch},
        "the test": {"hook": "on_test_batch_end", "batch": source.randrange(5)},
        "a save": {"hook": "on_save_checkpoint", "epoch": epoch},
        "a step": {"hook": hook, "epoch": epoch, "batch": batch},
        "any moment": {"hook": "clock", "after": round(source.uniform(0, 3), 3)},
    }[where]
    return Draw(workers, ranks, source.randint(1, 9), {**at, "rank": source.randrange(ranks)})


STOPS = {  # what reaches the whole process group, or is lost, and the signal that the run ends by
    "control_c": signal.SIGINT,
    "terminate_group": signal.SIGTERM,
    "hang_up": signal.SIGHUP,
    "lose_reader_and_control_c": signal.SIGINT,
}
MOMENTS: dict[str, dict[str, Any]] = {
    "the start": {},
    "a step": {"hook": "on_train_batch_start", "epoch": 1, "batch": 4},
    "validation": {"hook": "on_validation_batch_end", "epoch": 1, "batch": 1},
    "a save": {"hook": "on_save_checkpoint", "epoch": 1},
}


def stopped(where: Path, what: str, moment: str, *overrides: str, delay: float = 0.0) -> tuple[Run, list[str]]:
    """A run that is stopped in this way at this moment, and what is wrong with how it ended.

    Args:
        where: an empty directory.
        what: of ``STOPS``.
        moment: of ``MOMENTS``.
        overrides: more settings.
        delay: seconds from train.py's first line to a signal at the start.
    """

    def hit(leader: int) -> None:
        while not handles_signals(leader):
            time.sleep(0.01)
        time.sleep(delay)
        os.killpg(leader, STOPS[what])

    gone, options, same = None, {}, ["run.id=a", "data.num_workers=1", *overrides]
    if what == "lose_reader_and_control_c":
        gone = where / "once"
    if moment != "the start":
        same.append(fault(where, what, rank=1 if moment == "a step" else 0, **MOMENTS[moment]))
    elif gone is None:
        options = {"fresh": True, "meanwhile": hit}
    else:  # nobody reads the first line
        gone.touch()
        same.append(f"+callbacks.fault={{_target_: faults.Fault, what: control_c, once: {where / 'then'}, epoch: 1}}")
    run = faulty(where, *same, gone=gone, **options)
    return run, list(_ended_wrongly(run, STOPS[what], moment, read=gone is None))


def _ended_wrongly(run: Run, number: signal.Signals, moment: str, *, read: bool) -> Iterator[str]:
    if run.code != 128 + number:
        yield f"exit code {run.code}: {run.err}"
    if run.left:
        yield f"left {run.left}"
    if "Traceback" in run.err or (
        read and f"error: stopped by {number.name}" not in "".join(run.err.splitlines()[-1:])
    ):
        yield run.err
    if run.directory is None:
        if moment != "the start":
            yield "no run directory"
        return
    if run.json("run")["status"] != "interrupted":
        yield f"status {run.json('run')['status']}"
    checkpoints = [torch.load(path, weights_only=True) for path in (run.directory / "checkpoints").glob("step-*.ckpt")]
    if moment == "a step" and max(each["global_step"] for each in checkpoints) != BATCHES + 5:
        yield "no checkpoint of the step"


def uninterrupted(where: Path, workers: int, ranks: int) -> Run:
    return faulty(where, f"data.num_workers={workers}", *_devices(ranks), "run.id=straight")


def killed_and_resumed(where: Path, draw: Draw) -> tuple[Run, Run]:
    same = (
        *(f"data.num_workers={draw.workers}", *_devices(draw.ranks), "run.id=resumed"),
        *(f"resume.every_n_steps={draw.every_n_steps}", fault(where, "kill_everything", **draw.at)),
    )
    return faulty(where, *same), faulty(where, *same)


def _devices(ranks: int) -> tuple[str, str]:
    return f"trainer.devices={ranks}", "data.global_batch_size=64"


def differences(one: Run, other: Run) -> list[str]:
    """What is not bitwise the same at the end of two runs: the checkpoint with all it holds, the metrics, the test.

    But for times.
    """
    found = list(_different(*(_checkpoint(run) for run in (one, other)), "checkpoint"))
    for name in ("metrics.csv", "statistics.csv"):
        found += _different(*(_rows(run.directory / name) for run in (one, other)), name)
    results = [{k: run.json("result")[k] for k in ("test", "steps", "epochs")} for run in (one, other)]
    return found + list(_different(*results, "result"))


def _rows(path: Path) -> list[list[tuple[str, str]]]:
    times = ("seconds", "statistics/collective_share")
    return [[(name, value) for name, value in row.items() if name not in times] for row in read(path)]


def _checkpoint(run: Run) -> Any:
    """What is in the last checkpoint; paths begin at the run directory."""
    checkpoint = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)
    (best,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint"))
    best["best_k_models"] = {_inside(run, path): score for path, score in best["best_k_models"].items()}
    for name in ("best_model_path", "kth_best_model_path", "last_model_path", "dirpath"):
        best[name] = _inside(run, best[name])
    return checkpoint


def _inside(run: Run, path: str) -> str:
    return path.removeprefix(str(run.directory))


def _different(one: Any, other: Any, path: str) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(one.keys() ^ other.keys())} on one side only"]
        return [each for key in one for each in _different(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{path}: {len(one)} against {len(other)}"]
        return [
            each for i, pair in enumerate(zip(one, other, strict=True)) for each in _different(*pair, f"{path}/{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [f"{path}: tensors"]
    return [] if one == other else [f"{path}: {one!r} against {other!r}"]
