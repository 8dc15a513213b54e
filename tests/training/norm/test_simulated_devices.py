"""``simulate=N`` against N processes, through the program."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from syncbn.nn.simulation import Simulated
from syncbn.training.data.loaders import train_loader
from syncbn.training.errors import SettingError
from syncbn.training.loggers.csv_logger import read
from syncbn.training.norm.simulated_devices import RefuseRest, SimulatedDevicesPlugin, refuse
from tests.support.refuses import refuses
from tests.training.support.faulty_runs import fault, faulty
from tests.training.support.settled_config import settled
from tests.training.support.train_command import Run, train

SMALL = ["model=mlp", "logger=csv", "trainer.precision=64-true", "trainer.max_epochs=2", "optimizer.lr=0.02"]
SMALL += ["data.test_fraction=0.35", "data.val_fraction=0.08", "callbacks.checkpoint.monitor=null"]


def figures(run: Run) -> list[dict[str, float]]:
    assert run.code == 0, run.err
    assert run.directory is not None
    rows = read(run.directory / "metrics.csv")
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def by_step(run: Run) -> dict[tuple[float, str], float]:
    """What is logged of whole epochs; a step's loss is of rank 0's batch alone."""
    rows = figures(run)
    return {(row["step"], name): row[name] for row in rows for name in row if name.endswith(("/loss", "/acc"))}


@pytest.mark.parametrize(
    "settings",
    [
        ["norm=sync", "trainer.accumulate_grad_batches=4", "precise_batches=8"],
        [
            "norm=local_mean",
            "precise_batches=7",
            "+callbacks.precise={_target_: syncbn.training.PreciseStatistics, num_batches: 5}",
        ],
        [
            "norm=sync",
            "norm.batch_size=8",
            "data.batch_size=16",
            "data.remainder=pad",
            "data.val_fraction=0.1",
            "data.shards=inversion",
        ],
    ],
)
def test_one_process_trains_as_two(tmp_path: Path, settings: list[str]) -> None:
    """Each figure that is logged, of training, validation and test, to rounding of float64 that grows over 2 epochs."""
    where = tmp_path / "one", tmp_path / "two"
    for each in where:
        each.mkdir()
    one = train(where[0], *SMALL, "data.batch_size=8", *settings, "simulate=2")
    two = train(where[1], *SMALL, "data.batch_size=8", *settings, "trainer.devices=2")
    assert "1 process on the CPU for 2 devices" in one.out
    found, expected = by_step(one), by_step(two)
    assert found.keys() == expected.keys()
    assert {name for _, name in found} >= {"train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc"}
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-6, abs=1e-9), key
    assert one.json("run")["normalization_batch"] == two.json("run")["normalization_batch"]


def test_what_devices_keep_each_by_itself_survives_a_stop(tmp_path: Path) -> None:
    settings = [*SMALL, "data.batch_size=8", "norm=local_mean", "simulate=2", "resume.every_n_steps=30"]
    whole = train(tmp_path, *settings, "run.id=whole")
    stop = fault(tmp_path, "kill", epoch=1, batch=40)
    assert train(tmp_path, *settings, "run.id=parts", stop).code == 1
    for other, line in (
        (["simulate=4", "data.batch_size=4"], "simulate=4 and 16 samples at once: "),
        (["simulate=null", "trainer.devices=2"], "simulate=null and 16 samples at once: "),
        (["trainer.accumulate_grad_batches=2"], "simulate=2 and 32 samples at once: "),
    ):
        refused = train(tmp_path, *settings, "run.id=parts", *other)
        assert refused.code == 1
        assert refused.err.startswith(f"error: {line}")
        assert "in the middle of an epoch with simulate=2 and 16 samples at once; resume with that, or" in refused.err
        assert len(refused.err.splitlines()) == 1
    rest = train(tmp_path, *settings, "run.id=parts")
    assert "resumes from" in rest.out
    assert figures(rest) == figures(whole)
    ended = f"ckpt_path={whole.directory}/checkpoints/last.ckpt"
    more = train(tmp_path, *settings, "run.id=more", ended, "simulate=4", "data.batch_size=4", "trainer.max_epochs=3")
    assert more.code == 0, more.err
    assert more.json("result")["steps"] == 3 * 64


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["trainer.devices=2"], "simulate=2: one process represents all devices, but trainer.devices=2"),
        (["data.remainder=uneven"], "simulate=2: simulated devices hold equally many samples"),
        (
            ["trainer.accumulate_grad_batches=7"],
            "simulate and trainer.accumulate_grad_batches=7: an epoch has 64 batches of 16, so its last step would",
        ),
        (["norm.batch_size=5"], "norm.batch_size=5: 5 samples cannot share statistics with 8 on each of 2 devices"),
        (["simulate=0"], "simulate=0: use a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_simulated(tmp_path: Path, settings: list[str], line: str) -> None:
    run = train(tmp_path, *SMALL, "data.batch_size=8", "simulate=2", *settings)
    assert run.code == 1
    assert line in run.err
    assert len(run.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["norm.ghost_batch=3"], r"norm\.ghost_batch=3: with simulate=4 .* the 8 samples .*: 1, 2, 4, 8$"),
        ([*(ACCUMULATE := ["trainer.accumulate_grad_batches=4"]), "precise_batches=6"], r"=6: simulate=4 .* of 4$"),
        (
            [*ACCUMULATE, "+trainer.val_check_interval=0.5"],
            r"val_check_interval=0\.5: simulate=4 takes .*; use 1\.0, a",
        ),
        ([*ACCUMULATE, "+trainer.val_check_interval=1"], r"val_check_interval=1: simulate=4 takes"),
        (["data.shards=labels", "data.num_shards=3"], r"data\.num_shards=3: each of 4 devices .*; numbers .*: 2, 4$"),
        (["data.shards=labels", "data.num_shards=2", "simulate=1"], r"=2: each of 1 devices .*; use 2 devices, or"),
    ],
)
def test_what_is_refused_with_the_settings(settings: list[str], line: str) -> None:
    with pytest.raises(SettingError, match=line):
        settled("simulate=4", "data.batch_size=8", *settings)


def test_what_goes_with_simulated_devices() -> None:
    settled("simulate=4", "data.batch_size=8", "data.shards=labels", "data.num_shards=2", "norm.ghost_batch=8")
    settled("simulate=4", *ACCUMULATE, "precise_batches=8", "+trainer.val_check_interval=1.0")
    settled("trainer.devices=2", *ACCUMULATE, "precise_batches=6", "+trainer.val_check_interval=0.5")


@pytest.mark.parametrize(("remainder", "accumulate", "fits"), [("drop", 2, False), ("pad", 2, True), ("pad", 4, False)])
def test_padded_batches_count(remainder: str, accumulate: int, fits: bool) -> None:
    """988 samples are 61 batches of 16, or 62 with the padded one."""
    loader = train_loader(TensorDataset(torch.zeros(988)), 16 * accumulate, remainder=remainder)
    trainer: Any = SimpleNamespace(train_dataloader=loader, num_training_batches=len(loader))
    check = RefuseRest(16, accumulate)
    if fits:
        check.on_train_start(trainer, None)  # type: ignore[arg-type]
        return
    batches = 62 if remainder == "pad" else 61
    setting = "simulate and trainer.accumulate_grad_batches"
    with refuses(setting, accumulate, f"an epoch has {batches} batches of 16", f"a multiple of {16 * accumulate} "):
        check.on_train_start(trainer, None)  # type: ignore[arg-type]


def test_ghost_batches_of_synchronized_layers_are_simulated() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    norm = {"name": "sync", "group": "world", "ghost_batch": 2, "only": "0"}
    first, second = SimulatedDevicesPlugin(norm, 4).apply(model)
    assert isinstance(first, Simulated)
    assert (first.sharing, first.ghost_batch) == (1, 2)
    assert (second.sharing, second.ghost_batch) == (1, None)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Dropout(0.25), ["1 (Dropout) has dropout 0.25, ", "; use 0 there, or simulate=null"]),
        (nn.AlphaDropout(), ["1 (AlphaDropout) has dropout 0.5"]),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), ["1 (LSTM) has dropout 0.1"]),
        (nn.InstanceNorm2d(2, track_running_stats=True), ["1 (InstanceNorm2d) has running statistics", "stats=False"]),
        (nn.BatchNorm2d(2, track_running_stats=False), ["1 (BatchNorm2d) has no running statistics", "stats=True"]),
        (nn.Dropout(0.0), None),
        (nn.Dropout(0.25).eval(), None),
        (nn.InstanceNorm2d(2), None),
        (nn.BatchNorm2d(2), None),
    ],
)
def test_layers_that_one_process_cannot_equal(layer: nn.Module, words: list[str] | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), layer)
    if words is None:
        refuse(model)
        return
    with refuses("simulate", None, *words):
        refuse(model)


def test_such_a_layer_ends_a_run(tmp_path: Path) -> None:
    run = faulty(tmp_path, "simulate=2")
    assert run.code == 1
    assert run.err.startswith("error: simulate: network.")
    assert "(Dropout) has dropout 0.2, which each device draws separately; use 0 there, or simulate=null\n" in run.err
