"""The private parts of torchmetrics are there, and mean what they did in torchmetrics 1.9."""

import pytest
import torch
from torchmetrics import MeanMetric

from syncbn.training.checkpoint import torchmetrics_internals


@pytest.mark.parametrize("name", ["_update_count", "_computed"])
def test_torchmetrics_has_the_attribute(name: str) -> None:
    assert hasattr(MeanMetric(), name), name


def test_the_count_is_the_public_one() -> None:
    metric = MeanMetric()
    torchmetrics_internals.set_update_count(metric, 3)
    assert metric.update_count == 3


def test_a_result_is_computed_again() -> None:
    metric = MeanMetric()
    metric.update(1.0)
    assert metric.compute() == 1
    metric.mean_value = torch.tensor(2.0)
    assert metric.compute() == 1
    torchmetrics_internals.forget_result(metric)
    assert metric.compute() == 2
