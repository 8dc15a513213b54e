"""The line about the model: its numbers are right, and printing it changes nothing about the training."""

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncbn.nn import simulation
from syncbn.nn.conversion.convert import convert
from syncbn.training import MLP, ResNet
from syncbn.training.models import flops
from syncbn.training.norm.replace import remove_batch_norm, replace_by_group_norm
from syncbn.training.terminal import model_line
from syncbn.training.terminal.model_line import ModelLine
from tests.training.support.plain_lightning import QUIET, quiet_trainer


def by_hand(network: nn.Module, x: Tensor) -> int:
    """Two operations per weight and output position of each convolution and linear layer, from their real outputs."""
    found = []

    def hook(layer: Any, _: Any, y: Tensor) -> None:
        per_output = layer.weight[0].numel()  # inputs of one output value
        found.append(2 * per_output * y.numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(hook)
    with torch.no_grad():
        network.eval()(x)
    return sum(found)


class Drops(nn.Module):
    """Draws from all generators, in evaluation too, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
        self.head = nn.Linear(4 * 36, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        random.random()
        np.random.rand()
        return self.head(self.inner(x) + 0 * torch.rand(1, device=x.device))


@pytest.mark.parametrize("make", [ResNet, lambda: MLP(64, 10), Drops, lambda: ResNet(blocks=(2, 1), width=8)])
def test_the_operations_are_those_of_the_layers(make: Callable[[], nn.Module]) -> None:
    shadow = flops.shadow(make())
    assert shadow is not None
    assert flops.count(shadow, flops.first(torch.rand(5, 1, 8, 8))) == by_hand(make(), torch.rand(1, 1, 8, 8))


def test_a_known_number() -> None:
    shadow = flops.shadow(nn.Conv2d(3, 16, 3, padding=1))
    assert shadow is not None
    assert flops.count(shadow, flops.first(torch.rand(2, 3, 32, 32))) == 2 * 16 * 32 * 32 * 3 * 9


def test_attention_and_half_precision_and_an_empty_batch_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).half()
    shadow = flops.shadow(layer)
    assert shadow is not None
    projections = 2 * 7 * (4 * 32 * 32 + 2 * 32 * 64)
    assert flops.count(shadow, flops.first(torch.rand(0, 7, 32))) == projections + 2 * 2 * 7 * 7 * 32


class Chooses(nn.Linear):
    """Its forward pass depends on a number, which the meta device does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.generator = (number for number in range(3))  # cannot be copied


def test_a_network_that_cannot_be_counted_has_no_number() -> None:
    shadow = flops.shadow(Chooses(2, 2))
    assert shadow is not None
    assert flops.count(shadow, flops.first(torch.rand(3, 2))) is None
    assert flops.shadow(Locked()) is None
    assert "FLOPs" not in model_line.describe(Locked())


def test_counting_touches_no_number_and_no_generator() -> None:
    network = Drops()
    network.inner.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    other, x = Drops(), torch.rand(2, 1, 8, 8)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    counted, shadow = flops.shadow(other), flops.shadow(network)
    assert counted is not None
    assert flops.count(counted, flops.first(x)) is not None
    assert shadow is not None
    assert {each.device.type for each in (*shadow.parameters(), *shadow.buffers())} == {"meta"}
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert network.calls == 0
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = Drops()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(*callbacks: pl.Callback) -> tuple[dict[str, Tensor], Tensor, float, int]:
    module = Module()
    random.seed(0)
    torch.manual_seed(2)
    data = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8)), 4, shuffle=True)
    quiet_trainer(*callbacks, max_epochs=2).fit(module, data)
    return module.state_dict(), torch.get_rng_state(), random.random(), module.network.calls


@QUIET
def test_training_is_bitwise_the_same_with_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    weights, state, draw, calls = trained()
    assert capsys.readouterr().out == ""
    with_line = trained(ModelLine())
    assert all(torch.equal(value, with_line[0][name]) for name, value in weights.items())
    assert torch.equal(state, with_line[1])
    assert (draw, calls) == with_line[2:]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "model: 1,494 parameters (all train), 5.47 kFLOPs per sample; 1 batch norm layer: all per process"


class Own(pl.LightningModule):
    """A user's module: a forward of its own, and no ``network``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class OnePart(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)


@pytest.mark.parametrize(("module", "operations"), [(Own(), 2 * (6 + 12)), (OnePart(), 12)])
def test_modules_of_the_users_own_are_counted_by_their_forward(module: pl.LightningModule, operations: int) -> None:
    shadow = flops.shadow(flops.network_of(module))
    assert shadow is not None
    assert flops.count(shadow, flops.first(torch.rand(3, 2))) == operations


def frozen(network: nn.Module) -> nn.Module:
    network.stem.requires_grad_(False).eval()
    return convert(network)


def simulated(sharing: int) -> Callable[[nn.Module], nn.Module]:
    return lambda network: simulation.simulate(network, 4, sharing=sharing)


def ghost_simulated(network: nn.Module) -> nn.Module:
    return simulation.simulate(network, 4, sharing=1, ghost_batch=8)


def without(network: nn.Module) -> nn.Module:
    remove_batch_norm(network)
    return network


def grouped(network: nn.Module) -> nn.Module:
    replace_by_group_norm(network)
    return network


@pytest.mark.parametrize(
    ("change", "ranks", "norms"),
    [
        (lambda n: n, 2, "9 batch norm layers: all per process"),  # norm=local, local_mean
        (convert, 2, "9 batch norm layers: all synchronized over world (2 processes)"),
        (convert, 1, "9 batch norm layers: all per process"),
        (lambda n: convert(n, group="node"), 4, "9 batch norm layers: all synchronized over node"),
        (lambda n: convert(n, group=2), 4, "9 batch norm layers: all synchronized over groups of 2 processes"),
        (lambda n: convert(n, group=1), 4, "9 batch norm layers: all per process"),
        (lambda n: convert(n, only="stem*"), 2, "8 per process, 1 synchronized over world (2 processes)"),
        (lambda n: convert(n, group=1, ghost_batch=8), 2, "9 batch norm layers: all in ghost batches of 8"),
        (frozen, 2, "8 synchronized over world (2 processes), 1 with running statistics"),
        (simulated(4), 1, "9 batch norm layers: all synchronized over world (4 simulated devices)"),
        (simulated(2), 1, "9 batch norm layers: all synchronized over groups of 2 simulated devices"),
        (simulated(1), 1, "9 batch norm layers: all per simulated device"),
        (ghost_simulated, 1, "9 batch norm layers: all in ghost batches of 8"),
        (nn.SyncBatchNorm.convert_sync_batchnorm, 2, "all synchronized over world (2 processes)"),
        (without, 2, "no batch norm layers"),
        (grouped, 2, "no batch norm layers, 9 group norm layers"),
        (lambda n: n.eval(), 2, "9 batch norm layers: all with running statistics"),  # mode=test
    ],
)
def test_batch_norm_layers_by_their_statistics(
    change: Callable[[nn.Module], nn.Module], ranks: int, norms: str
) -> None:
    line = model_line.describe(change(ResNet()), 1_527_040, ranks)
    assert line.endswith(norms)
    assert ", 1.53 MFLOPs per sample; " in line


def test_lazy_layers_have_no_numbers_yet() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d(), nn.LazyLinear(4))
    assert flops.shadow(network) is None
    words = "model: 9 parameters (all train; without lazy layers, which have no shape yet); 1 batch norm layer: all "
    assert model_line.describe(network) == f"{words}per process"


def test_frozen_parameters_do_not_train() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    network[0].requires_grad_(False)
    assert model_line.describe(network).startswith("model: 13 parameters (4 train); ")
