"""Gradients, time to a target and the fit to the training images, through the program: one process and two, stopped and
resumed.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from syncbn.training import MLP, Digits
from syncbn.training.errors import AgreedError
from syncbn.training.evaluation.generalization_gap import RefuseUnfit
from syncbn.training.loggers.csv_logger import read
from tests.support.refuses import refuses
from tests.training.support.faulty_runs import fault
from tests.training.support.train_command import Run, train

SETTINGS = ["model=mlp", "logger=csv", "trainer.precision=64-true", "data.batch_size=8", "scheduler=constant"]
SETTINGS += ["callbacks=gradients", "trainer.log_every_n_steps=5", "trainer.max_epochs=1", "optimizer.lr=0.02"]
SETTINGS += [
    "+trainer.limit_train_batches=20",
    "+trainer.limit_val_batches=3",
    "+trainer.val_check_interval=4",
    "resume.every_n_steps=5",
]
SETTINGS += ["target=0.4", "fit=true", "precise_batches=4", "data.test_fraction=0.6", "data.val_fraction=0.1"]
PARTS = ("test", "fit", "precise", "gradients", "target")


def gradients(run: Run) -> dict[tuple[str, str], list[float]]:
    assert run.directory is not None
    rows = read(run.directory / "gradients.csv")
    return {(row["step"], row["layer"]): [float(row[key]) for key in ("depth", "norm", "weight_norm")] for row in rows}


def test_one_process_stopped_and_gone_on_says_what_two_do(tmp_path: Path) -> None:
    two = train(tmp_path, *SETTINGS, "trainer.devices=2")
    assert two.code == 0, two.err
    one = [*SETTINGS, "simulate=2", "run.id=one"]
    assert train(tmp_path, *one, fault(tmp_path, "kill", batch=12)).code == 1  # behind the look of step 9
    rest = train(tmp_path, *one)
    assert "resumes from outputs/one/checkpoints/step-00000010.ckpt" in rest.out

    found, expected = rest.json("result"), two.json("result")
    seconds = [each["target"].pop("target/seconds") for each in (found, expected)]
    for each, spent in zip((found, expected), seconds, strict=True):
        assert spent > 0
        assert each["target"]["target/reached"] == 1
        assert each["target"]["target/steps"] % 4 == 0
    for part in PARTS:
        assert found[part] == pytest.approx(expected[part], rel=1e-6, abs=1e-9), part
    assert set(found["gradients"]) == {
        f"gradients/{name}" for name in ("growth", "decades", "growth_end", "decades_end")
    }
    rows, expected_rows = gradients(rest), gradients(two)
    assert sorted({int(step) for step, _ in rows}) == [0, 4, 9, 14, 19]
    assert rows.keys() == expected_rows.keys()
    for key, row in rows.items():
        assert row == pytest.approx(expected_rows[key], rel=1e-6), key
    assert len(read(rest.directory / "gradients.csv")) == len(rows)  # type: ignore[operator]  # none twice
    metrics = read(two.directory / "metrics.csv")  # type: ignore[operator]
    reached = [int(row["step"]) + 1 for row in metrics if row["val/acc"] and float(row["val/acc"]) >= 0.4]
    assert expected["target"]["target/steps"] == reached[0]
    assert metrics[-2]["fit/gap"]

    data, net = Digits(test_fraction=0.6, val_fraction=0.1), MLP().double()
    data.setup("fit")
    best = torch.load(expected["checkpoint"], weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("network."): v for name, v in best.items() if name.startswith("network.")})
    images, labels = data.train.tensors
    with torch.no_grad():
        scores = net.eval()(images.double())
    fit = expected["fit"]
    assert fit["fit/count"] == len(labels)
    assert fit["fit/loss"] == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-6)
    assert fit["fit/acc"] == pytest.approx((scores.argmax(1) == labels).double().mean().item(), rel=1e-6)
    assert fit["fit/gap"] == pytest.approx(expected["test"]["test/loss"] - fit["fit/loss"], rel=1e-9)


def test_training_data_that_cannot_be_gone_through_are_refused_before_training() -> None:
    trainer: Any = SimpleNamespace(train_dataloader=[1, 2], datamodule=None)
    with refuses("fit", True, "no second loader", "(list); use fit=false", kind=AgreedError):
        RefuseUnfit().on_train_start(trainer, pl.LightningModule())
