"""Class weights and soft targets: the loss over ranks is torch's, over the whole batch on one process."""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn.comm import all_reduce
from syncbn.training.errors import AgreedError
from syncbn.training.models.classifier import Classifier
from tests.support.ranks import Ranks, messages
from tests.support.refuses import refuses

WEIGHTS = [0.2, 3.0, 1.0]
SGD = partial(torch.optim.SGD, lr=0.1)


class Step(nn.Module):
    def __init__(self, module: Classifier) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        return self.module.training_step(batch, 0)


def on_a_rank(
    rank: int, world_size: int, net: nn.Module, x: Tensor, target: Tensor, smoothing: float
) -> tuple[list[Tensor], float]:
    module = Classifier(net, SGD, num_classes=3, label_smoothing=smoothing, class_weights=WEIGHTS).double()
    module._trainer = SimpleNamespace(train_dataloader=None, world_size=world_size)  # type: ignore[assignment]
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    with messages() as seen, torch.no_grad():
        module.training_step((x[rank::world_size], target[rank::world_size]), 0)
    assert len(seen.operations) == 1, seen.operations  # no barrier
    with messages() as seen, torch.no_grad(), all_reduce.alone():  # a step that is repeated on this rank only
        module.training_step((x[rank::world_size], target[rank::world_size]), 0)
    assert len(seen.operations) == 0, seen.operations
    module.train_mean_loss.reset()
    wrapped = DistributedDataParallel(Step(module))  # kept, since its reducer works in backward
    wrapped((x[rank::world_size], target[rank::world_size])).backward()
    metric = module.train_mean_loss
    dist.all_reduce(metric.mean_value)
    dist.all_reduce(metric.weight)
    return [p.grad for p in net.parameters()], float(metric.mean_value / metric.weight)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("samples", "smoothing"), [(7, 0.0), (1, 0.1), (8, 0.1)])
def test_the_weighted_mean_is_over_the_whole_batch(ranks: Ranks, samples: int, smoothing: float, soft: bool) -> None:
    """On 2 ranks, whose shares have unequal weights; one share may be empty."""
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    target = torch.randint(3, (samples,), generator=generator)
    if soft:
        target = torch.rand(samples, 3, generator=generator, dtype=torch.float64).softmax(1)
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    one = deepcopy(net)
    weight = torch.tensor(WEIGHTS, dtype=torch.float32).double()
    loss = F.cross_entropy(one(x), target, weight=weight, label_smoothing=smoothing)
    loss.backward()
    for gradients, logged in ranks.run(on_a_rank, net, x, target, smoothing, world_size=2):
        for ours, theirs in zip(gradients, one.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=0, atol=1e-12)
        assert logged == pytest.approx(loss.item(), rel=1e-6)  # metrics are float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_of_classes_without_weight_is_no_step(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    net = nn.Linear(2, 3)
    module = Classifier(net, SGD, num_classes=3, label_smoothing=smoothing, class_weights=[0.0, 1.0, 1.0])
    module._trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module.training_step((torch.randn(4, 2), torch.tensor([1, 1, 2, 0])), 0)
    before = module.train_mean_loss.compute()
    loss = module.training_step((torch.randn(4, 2), torch.zeros(4, dtype=torch.long)), 1)
    loss.backward()
    assert loss.item() == 0
    assert all(bool((each.grad == 0).all()) for each in net.parameters())
    assert torch.equal(module.train_mean_loss.compute(), before)


def test_balanced_weights_come_from_the_training_images() -> None:
    module = Classifier(nn.Linear(2, 3), SGD, num_classes=3, class_weights="balanced")
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(class_counts=[6, 3, 1]))  # type: ignore[assignment]
    module.setup("fit")
    assert module.class_weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert "class_weights" not in module.state_dict()  # a checkpoint fits with weights and without
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace())  # type: ignore[assignment]
    with refuses("module.class_weights", "balanced", "has no class_counts", kind=AgreedError):
        module.setup("fit")
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(class_counts=[6, 3]))  # type: ignore[assignment]
    with refuses("module.class_weights", "balanced", "2 classes and the network has 3 outputs", kind=AgreedError):
        module.setup("fit")


def test_soft_targets_count_for_the_class_with_the_largest_share(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Classifier(nn.Identity(), SGD, num_classes=3)
    module._trainer = None
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    scores = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
    soft = torch.tensor([[0.6, 0.4, 0], [0.7, 0.3, 0], [0, 0.4, 0.6]])
    loss, _ = module._step("train", (scores, soft))
    torch.testing.assert_close(loss, F.cross_entropy(scores, soft))
    assert module.train_acc.compute().item() == pytest.approx(2 / 3)


def test_the_test_counts_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Classifier(nn.Identity(), SGD, num_classes=3)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    module.on_test_epoch_start()
    module.test_step((torch.eye(3)[[0, 0, 1]], torch.tensor([0, 1, 1])), 0)
    module.on_test_epoch_end()
    assert module.class_accuracy[:2] == [(1, 1.0), (2, 0.5)]
    assert module.class_accuracy[2][0] == 0
    assert module.class_accuracy[2][1] != module.class_accuracy[2][1]  # nan: no sample
