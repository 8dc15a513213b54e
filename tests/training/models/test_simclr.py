"""SimCLR on several ranks against one process on the whole batch; validation and test by probes."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.training import MLP, ResNet, SimCLR
from syncbn.training.models.contrastive.network import ContrastiveNetwork
from tests.support.ranks import Ranks, messages
from tests.support.refuses import refuses

SGD = partial(torch.optim.SGD, lr=0.1)


class Step(nn.Module):
    """One training step, to be wrapped in DistributedDataParallel as Lightning does."""

    def __init__(self, module: Any, ranks: int) -> None:
        super().__init__()
        self.module, self.ranks = module, SimpleNamespace(world_size=ranks)
        module.trainer, module.log = self.ranks, lambda *_, **__: None

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.module.training_step((first, second, None), 0)


def module(kind: type = SimCLR, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(MLP(in_features=9, depth=2, width=8), SGD, dim=4, **settings).double()


def views(images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, images, 9, generator=generator, dtype=torch.float64)
    return first, second


def share(x: Tensor, rank: int, counts: tuple[int, ...]) -> Tensor:
    """The images of a rank: those of the interleaved order, in which ranks that have no more are left out."""
    holders = [each for row in range(max(counts)) for each in range(len(counts)) if row < counts[each]]
    return x[torch.tensor([each == rank for each in holders])]


def gradients_of_rank(rank: int, world_size: int, counts: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    step = DistributedDataParallel(Step(syncbn.convert(module()), world_size))
    first, second = (share(each, rank, counts) for each in views(sum(counts)))
    with messages() as forward:
        loss = step(first, second)
    with messages() as backward:
        loss.backward()
    gathers = [sum("gather" in each for each in sent.operations) for sent in (forward, backward)]
    assert gathers == [2, 0], (forward.operations, backward.operations)
    simclr: Any = step.module.module
    return {name: p.grad for name, p in simclr.named_parameters()}, simclr.train_loss.compute()


@pytest.mark.parametrize("counts", [(4, 4), (5, 3), (3, 0, 4)])
def test_gradients_are_those_of_one_process_on_all_images(ranks: Ranks, counts: tuple[int, ...]) -> None:
    alone = Step(module(), 1)
    loss = alone(*views(sum(counts)))
    loss.backward()
    for found, mean_loss in ranks.run(gradients_of_rank, counts, world_size=len(counts)):
        assert float(mean_loss) == pytest.approx(loss.item(), rel=1e-6)  # the metric has single precision
        for name, parameter in alone.module.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_last_linear_layer_becomes_a_projection_head() -> None:
    for network, width in ((MLP(width=24), 24), (ResNet(width=4), 16)):
        made = ContrastiveNetwork(network, dim=6)
        x = torch.rand(3, 1, 8, 8)
        assert made.encoder(x).shape == (3, width)
        torch.testing.assert_close(made(x).norm(dim=1), torch.ones(3))
    with refuses("model", None, "Sequential has no linear layer"):
        ContrastiveNetwork(nn.Sequential(nn.Flatten()))


def test_a_temperature_of_zero_is_refused() -> None:
    with refuses("module.temperature", 0.0, "above 0"):
        module(temperature=0.0)
