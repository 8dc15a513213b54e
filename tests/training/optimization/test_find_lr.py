"""The search for a learning rate: the same on two ranks as on one, a suggestion, and files; nothing is trained."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from syncbn.training.errors import AgreedError
from syncbn.training.optimization.find_lr import Curve, RateSearch, suggestion
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET, quiet_trainer
from tests.training.support.train_command import Run, train

SEARCH = ["mode=find_lr", "logger=csv", "model=mlp", "data.global_batch_size=64", "trainer.precision=64-true"]


def curve(run: Run) -> np.ndarray:
    assert run.directory is not None
    with (run.directory / "find_lr.csv").open(encoding="utf-8") as file:
        return np.array([[float(value) for value in row.values()] for row in csv.DictReader(file)])


def test_two_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    two = train(tmp_path, *SEARCH, "run.id=two", "trainer.devices=2", "find_lr.steps=60").ended()
    one = train(tmp_path, *SEARCH, "run.id=one", "trainer.devices=1", "find_lr.steps=60").ended()
    found, expected = curve(two), curve(one)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # losses are summed in single precision
    rates = found[:, 0]
    assert rates[0] == pytest.approx(1e-6)
    np.testing.assert_allclose(rates[1:] / rates[:-1], (10 / 1e-6) ** (1 / 59), rtol=1e-9)
    result = two.json("result")["find_lr"]
    assert result["lr"] == pytest.approx(one.json("result")["find_lr"]["lr"])
    assert f"suggested: optimizer.lr={result['lr']:.3g}, where the loss falls fastest" in two.out
    assert 1e-4 < result["lr"] < result["lowest_loss_at"] <= 10
    assert (two.directory / "find_lr.png").read_bytes().startswith(b"\x89PNG")
    assert list(two.directory.glob("checkpoints/*")) == []
    assert "epoch" not in two.out
    again = train(tmp_path, *SEARCH, "run.id=two", "trainer.devices=2", "find_lr.steps=60").ended()
    assert "run two has finished before" in again.out


def test_simulated_devices_and_a_rate_per_batch(tmp_path: Path) -> None:
    settings = ["simulate=2", "norm=local_mean", "trainer.accumulate_grad_batches=2", "optimizer.lr_batch=256"]
    run = train(tmp_path, *SEARCH, *settings, "optimizer.layer_decay=0.9", "find_lr.steps=40").ended()
    found = curve(run)
    losses = found[10:, 2]
    steepest = found[10:, 0][np.gradient(losses, np.log(found[10:, 0])).argmin()]
    assert run.json("result")["find_lr"]["lr"] == pytest.approx(steepest * 256 / 128)
    assert "(for optimizer.lr_batch=256)" in run.out


@QUIET
def test_the_loss_of_accumulated_batches_is_their_mean() -> None:
    """The last step of an epoch has one batch."""

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return batch[0].mean() + 0 * self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    search = RateSearch(1e-6, 1e-5, 4)
    options = {"accumulate_grad_batches": 2, "max_epochs": -1, "max_steps": 4}
    data = DataLoader(TensorDataset(torch.tensor([1.0, 2, 3])), 1)
    quiet_trainer(search, **options).fit(Module(), data)
    assert search.curve.losses == [1.5, 3, 1.5, 3]


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    rates = [RateSearch(1e-6, 10, 100).rate(step) for step in range(100)]
    middle = np.log(1e-2)
    losses = [2 - 1 / (1 + np.exp(-(np.log(rate) - middle))) for rate in rates]
    steepest, lowest = suggestion(Curve(rates, losses, losses))
    assert steepest == pytest.approx(1e-2, rel=0.1)
    assert lowest == rates[-1]
    with refuses("find_lr.min", rates[0], "does not fall", kind=AgreedError):
        suggestion(Curve(rates, losses[::-1], losses[::-1]))
