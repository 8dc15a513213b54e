"""``simulate=N`` against N processes, through the program."""

from pathlib import Path

import pytest

from syncbn.training.metrics_file import read
from tests.training.command import Run, train
from tests.training.faulty import fault

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
    settings = [*SMALL, "data.batch_size=8", "norm=local_mean", "simulate=2", "resume.every_n_steps=5"]
    whole = train(tmp_path, *settings, "run.id=whole")
    stop = fault(tmp_path, "kill", epoch=1, batch=28)
    assert train(tmp_path, *settings, "run.id=parts", stop).code == 1
    rest = train(tmp_path, *settings, "run.id=parts")
    assert "goes on from" in rest.out
    assert figures(rest) == figures(whole)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["trainer.devices=2"], "simulate=2: one process stands for the devices, but trainer.devices=2"),
        (["data.remainder=uneven"], "simulate=2: devices that are simulated hold equally many samples"),
        (
            ["trainer.accumulate_grad_batches=7"],
            "simulate and trainer.accumulate_grad_batches=7: an epoch has 64 batches of 16, so its last step would",
        ),
        (["norm.batch_size=5"], "norm.batch_size=5 samples cannot share statistics with 8 on each of 2 devices"),
        (["simulate=0"], "simulate=0: use a whole number, 1 or more"),
    ],
)
def test_what_cannot_be_simulated(tmp_path: Path, settings: list[str], line: str) -> None:
    run = train(tmp_path, *SMALL, "data.batch_size=8", "simulate=2", *settings)
    assert run.code == 1
    assert line in run.err
    assert len(run.err.splitlines()) == 1
