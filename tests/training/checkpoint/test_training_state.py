"""What a resume point holds of metrics is set as they have it, and nothing else of them."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric

from syncbn.training.checkpoint.training_state import metrics_state, set_metrics


def trainer_of(metric: MeanMetric) -> Any:
    return SimpleNamespace(lightning_module=nn.ModuleDict({"mean": metric}))


def test_a_metric_gets_its_states_and_nothing_else() -> None:
    metric = MeanMetric()
    metric.update(torch.tensor([1.0, 3.0]))
    saved = metrics_state(trainer_of(metric))
    saved["mean"]["states"] |= {"compute": torch.zeros(1), "another": torch.zeros(1)}  # of a checkpoint from elsewhere
    fresh = MeanMetric()
    set_metrics(trainer_of(fresh), saved | {"unknown": saved["mean"]})
    assert fresh.compute() == 2.0
    assert fresh._update_count == 1
    assert not hasattr(fresh, "another")
