"""LeakMeter in plain Lightning, and in runs: one process that simulates devices against processes."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncbn.nn.simulation import simulate
from syncbn.training import DigitViews, LeakMeter
from syncbn.training.data.contrastive.held_out import batches_without_end, held_out_loader
from syncbn.training.errors import AgreedError
from syncbn.training.loggers.csv_logger import read
from tests.support.refuses import refuses
from tests.training.evaluation.test_measure_leak import DEVICES, FEATURES, DeviceMean
from tests.training.norm.test_simulated_devices import by_step
from tests.training.support.plain_lightning import QUIET, Kept, quiet_trainer
from tests.training.support.train_command import train

pytestmark = QUIET


class TwoViews(pl.LightningModule):
    """A user's module, which knows nothing of the meter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = simulate(DeviceMean(), DEVICES)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) * self.scale

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self(torch.cat(batch)).square().sum()

    def validation_step(self, batch: list[Tensor]) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def loader(batch_size: int = DEVICES, images: int = 4 * DEVICES) -> DataLoader[Any]:
    views = torch.randn(2, images, FEATURES, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(*views), batch_size)


@pytest.mark.parametrize("validate_every", [1, 5])
def test_it_measures_a_users_module_at_the_end_of_fit(validate_every: int) -> None:
    meter, logger = LeakMeter(num_batches=3), Kept()
    options = {"max_epochs": 2, "logger": logger, "check_val_every_n_epoch": validate_every, "num_sanity_val_steps": 0}
    module = TwoViews()
    quiet_trainer(meter, **options).fit(module, loader(), loader(batch_size=3))
    expected = {"leak/together": 1.0, "leak/spread": 0.0, "leak/difference": 1.0}
    assert meter.result == expected
    assert [(step, given) for step, given in logger.given if "leak/together" in given] == [(8, expected)]
    assert module.encoder.norm.num_batches_tracked == 8  # those of the steps


def test_batches_may_be_given() -> None:
    meter = LeakMeter(num_batches=2, batches=lambda: loader(2 * DEVICES))
    quiet_trainer(meter, max_epochs=1).fit(TwoViews(), loader(), loader())
    assert meter.result["leak/together"] > meter.result["leak/spread"]


def test_it_raises_before_training_where_it_could_not_measure_after_it() -> None:
    for images, limit, words in ((16, 0, "no validation loader"), (2, 1.0, "has 4 images, and the validation")):
        module = TwoViews()
        with refuses("callbacks.leak", None, words, kind=AgreedError):
            trainer = quiet_trainer(LeakMeter(), max_epochs=1, limit_val_batches=limit)
            trainer.fit(module, loader(), loader(1, images))
        assert module.encoder.norm.num_batches_tracked == 0
    with refuses("callbacks.leak.num_batches", 0, "1 or more"):
        LeakMeter(0)


RUN = ["experiment=simclr", "logger=csv", "trainer.precision=64-true", "trainer.max_epochs=2", "plots=false"]
RUN += ["data.batch_size=16", "callbacks.checkpoint.monitor=null", "norm=local"]


def test_one_process_measures_as_two(tmp_path: Path) -> None:
    """Losses, pretext accuracy, leak and probes of a run."""
    places = [tmp_path / name for name in ("one", "two")]
    for each in places:
        each.mkdir()
    settings = zip(places, ("simulate=2", "trainer.devices=2"), strict=True)
    one, two = (train(where, *RUN, each).ended() for where, each in settings)
    found, expected = by_step(one), by_step(two)
    assert found.keys() == expected.keys()
    assert {name for _, name in found} == {"train/loss", "val/loss"}
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-6, abs=1e-9), key
    results = [run.json("result") for run in (one, two)]
    assert results[0]["leak"] == results[1]["leak"]
    assert set(results[0]["leak"]) == {"leak/together", "leak/spread", "leak/difference"}
    assert results[0]["test"] == pytest.approx(results[1]["test"], rel=1e-6)
    assert set(results[0]["test"]) == {"test/acc_probe", "test/acc_nn", "test/count"}
    assert results[0]["test"]["test/acc_nn"] > 0.5
    logged = [row for row in read(one.directory / "metrics.csv") if row.get("leak/together")]  # type: ignore[operator]
    assert [float(row["leak/together"]) for row in logged] == [results[0]["leak"]["leak/together"]]


def test_joined_batches_of_a_contrastive_loss_are_refused(tmp_path: Path) -> None:
    run = train(tmp_path, *RUN, "simulate=2", "trainer.accumulate_grad_batches=2")
    assert run.code == 1
    assert "trainer.accumulate_grad_batches=2: with simulate the loss of SimCLR would compare images" in run.err


def test_each_pass_over_the_held_out_images_has_its_own_views_and_batches_as_large_as_in_training() -> None:
    data = DigitViews(64, seed=3)
    data.setup("fit")
    trainer = SimpleNamespace(val_dataloaders=data.val_dataloader(), train_dataloader=data.train_dataloader())

    def two_passes() -> list[Tensor]:
        loader = held_out_loader(trainer, AgreedError)
        return [first for first, _, _ in islice(batches_without_end(loader), 2 * len(loader))]

    found = two_passes()
    assert [len(each) for each in found] == [64] * 8  # of 269 images, 13 are left out
    assert len(torch.cat(found).flatten(1).unique(dim=0)) == 512
    assert all(torch.equal(one, two) for one, two in zip(found, two_passes(), strict=True))
