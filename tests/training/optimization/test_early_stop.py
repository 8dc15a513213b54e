"""Early stopping reads its metric after validations where not every epoch has one."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from syncbn.training.errors import AgreedError
from syncbn.training.optimization.early_stop import EarlyStop
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET, quiet_trainer


class Constant(pl.LightningModule):
    """Its metric never improves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.weight.sum() * batch[0].sum()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val/loss", 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(monitor: str, **options: Any) -> tuple[pl.Trainer, EarlyStop]:
    stop, data = EarlyStop(monitor, mode="min", patience=2), DataLoader(TensorDataset(torch.ones(4, 1)), 1)
    trainer = quiet_trainer(stop, max_epochs=8, num_sanity_val_steps=1, **options)
    trainer.fit(Constant(), data, data)
    return trainer, stop


@QUIET
@pytest.mark.parametrize(
    ("options", "epochs"),
    [({}, 3), ({"check_val_every_n_epoch": 2}, 6), ({"val_check_interval": 0.5}, 2)],
)
def test_it_counts_validations(options: dict[str, Any], epochs: int, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, stop = fit("val/loss", **options)
    assert trainer.current_epoch == epochs
    assert stop.result["epoch"] == epochs
    said = [line for line in capsys.readouterr().out.splitlines() if "training stops early" in line]
    assert len(said) == 1
    assert f"after epoch {epochs}: val/loss did not improve in 2 validations" in said[0]


@QUIET
@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}])
def test_a_metric_that_is_not_logged_is_refused(options: dict[str, Any]) -> None:
    with refuses("callbacks.checkpoint.monitor", "val/acc", "it logs val/loss", kind=AgreedError):
        fit("val/acc", **options)
