"""The tested count equals the data set's, and the mean is the data set's mean, on every world size."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from syncbn.training.data.loaders import exact_loader
from syncbn.training.models.classifier import Classifier
from tests.support.ranks import Ranks


def evaluate(rank: int, world_size: int, samples: int, batch_size: int) -> dict[str, float]:
    module = Classifier(nn.Flatten(), torch.optim.SGD, num_classes=3).double()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    data = TensorDataset(scores, torch.arange(samples) % 3)
    for index, batch in enumerate(exact_loader(data, batch_size)):
        module._current_fx_name = "test_step"
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # no Trainer here
        module.test_step(batch, index)
    return {
        "count": module.count.compute().item(),
        "loss": module.test_mean_loss.compute().item(),
        "acc": module.test_acc.compute().item(),
    }


@pytest.mark.parametrize(("samples", "batch_size"), [(5, 4), (5, 1), (65, 32), (7, 2)])
def test_evaluation_is_exact_on_every_world_size(ranks: Ranks, samples: int, batch_size: int) -> None:
    (one,) = ranks.run(evaluate, samples, batch_size, world_size=1)
    assert one["count"] == samples
    for world_size in (2, 3):
        for several in ranks.run(evaluate, samples, batch_size, world_size=world_size):
            assert several == pytest.approx(one, rel=1e-6)


def test_lightning_leaves_the_exact_sampler_in_place() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    connector = trainer._data_connector
    assert not connector._requires_distributed_sampler(exact_loader(TensorDataset(torch.arange(5)), 2))
