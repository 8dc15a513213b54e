"""GradientMonitor: norms against autograd, growth against the theory, and what it writes."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.data import DataLoader

from syncbn.training import MLP, GradientMonitor
from syncbn.training.callbacks.gradient_monitor import LayerGradient, OutputGradients, gradient_growth, layer_gradients
from syncbn.training.loggers.csv_logger import read
from syncbn.training.norm.replace import remove_batch_norm
from tests.support.ranks import Ranks
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET, Kept, quiet_trainer

THEORY = math.sqrt(math.pi / (math.pi - 1))

pytestmark = QUIET


class Net(nn.Module):
    """A convolution, one that is frozen, two layers with one weight, one that is not used, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.one, self.two, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.conv(x).mean((2, 3)))
        return self.head(self.two(self.one(x).relu()).relu())


class Lit(pl.LightningModule):
    def __init__(self, net: nn.Module, weight_decay: float = 0.5) -> None:
        super().__init__()
        self.net, self.weight_decay = net, weight_decay

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9, weight_decay=self.weight_decay)


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 1, 5, 5, generator=generator, dtype=torch.float64), torch.arange(8) % 3) for _ in range(number)
    ]


def test_norms_are_those_of_the_mean_gradient_before_clipping(tmp_path: Path) -> None:
    torch.manual_seed(1)
    lit, data, logger = Lit(Net().double()), batches(10), Kept()
    twin = copy.deepcopy(lit)
    layers = {"net.conv": 0, "net.one": 2, "net.head": 4}  # the frozen one is 1, the unused one 3
    outputs: list[tuple[str, Tensor]] = []
    for name in layers:
        twin.get_submodule(name).register_forward_hook(lambda *a, name=name: outputs.append((name, a[2])))
    optimizer, expected = twin.configure_optimizers(), {}
    for step in range(5):
        optimizer.zero_grad()
        squares = dict.fromkeys(layers, 0.0)
        for batch in data[2 * step : 2 * step + 2]:
            outputs.clear()
            loss = twin.training_step(batch) / 2
            gradients = torch.autograd.grad(loss, [output for _, output in outputs], retain_graph=True)
            for (name, _), gradient in zip(outputs, gradients, strict=True):
                squares[name] += gradient.square().sum().item()
            loss.backward()
        for name, depth in layers.items():
            weight = twin.get_submodule(name).weight
            norms = (weight.grad.square().sum().sqrt().item(), weight.square().sum().sqrt().item())
            expected[step, name] = (depth, math.sqrt(squares[name]), *norms)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        optimizer.step()
    monitor = GradientMonitor(directory=tmp_path)
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.01, "log_every_n_steps": 2}
    trainer = quiet_trainer(monitor, logger=logger, **options)
    trainer.fit(lit, DataLoader(data, batch_size=None))
    rows = {(int(row["step"]), row["layer"]): row for row in read(tmp_path / "gradients.csv")}
    steps = [0, 1, 3]  # the first, and when Lightning logs
    assert list(rows) == [(step, name) for step in steps for name in layers]
    for key, row in rows.items():
        depth, norm, weight_gradient, weight_norm = expected[key]
        assert int(row["depth"]) == depth
        assert float(row["norm"]) == pytest.approx(norm, rel=1e-10)
        assert float(row["weight_gradient"]) == pytest.approx(weight_gradient, rel=1e-10)
        assert float(row["weight_norm"]) == pytest.approx(weight_norm, rel=1e-10)
    logged = {step: metrics for step, metrics in logger.given if "gradients/net.one" in metrics}
    assert logged[1]["gradients/net.one"] == pytest.approx(expected[1, "net.one"][1])
    assert monitor.gradients == {}  # there are no three hidden layers of one shape


def after_backward(net: MLP, seed: int, batch: int = 128) -> list[LayerGradient]:
    generator = torch.Generator().manual_seed(seed)
    weight = net.head.weight
    x = torch.randn(batch, 64, generator=generator, dtype=weight.dtype)
    backward = OutputGradients(net)
    F.cross_entropy(net(x), torch.arange(batch) % 10).backward()
    backward.close()
    return layer_gradients(net, backward.norms())


@pytest.mark.parametrize("seed", range(3))
def test_relu_and_batch_norm_grow_as_theory_says(seed: int) -> None:
    torch.manual_seed(seed)
    found = gradient_growth(after_backward(MLP(depth=20, width=64), seed))
    assert 1.15 < found["growth"] < 1.27
    assert found["growth"] == pytest.approx(THEORY, abs=0.04)
    assert found["decades"] == pytest.approx(19 * math.log10(THEORY), abs=0.4)


def test_sigmoids_without_norm_vanish_and_are_still_told() -> None:
    torch.manual_seed(0)
    net = MLP(depth=50, activation="sigmoid").double()
    remove_batch_norm(net)
    found = gradient_growth(after_backward(net, 0))
    assert -60 < found["decades"] < -30
    assert found["growth"] == pytest.approx(10 ** (found["decades"] / 49), rel=0.05)


def test_torchs_initialization_and_relu_vanish_though_all_weights_have_gradients_alike() -> None:
    torch.manual_seed(0)
    net = MLP(depth=20, init="torch").double()
    remove_batch_norm(net)
    found = after_backward(net, 0)
    assert gradient_growth(found)["decades"] == pytest.approx(
        19 * math.log10(math.sqrt(1 / 6)), abs=1
    )  # He et al. 2015, eq. 14
    assert abs(math.log10(found[0].weight_gradient / found[-2].weight_gradient)) < 1  # what vanishes back grows forward


def test_a_compiled_network_is_seen_and_goes_on_compiled() -> None:
    """The backward pass of a look may come after it, and compiled steps before and after a look are as ever."""
    torch.manual_seed(0)
    net = MLP(depth=3, width=8)
    counter = CompileCounter()
    step = torch.compile(net, fullgraph=True, backend=counter)
    x, y = torch.randn(16, 64), torch.arange(16) % 10
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), net.head.weight)[0]

    def gradient(*, close: bool) -> Tensor:
        net.zero_grad()
        loss = F.cross_entropy(step(x), y)
        if close:
            backward.close()
        loss.backward()
        return net.head.weight.grad.clone()

    backward = OutputGradients(net)
    assert torch.equal(gradient(close=False), expected)
    assert len(backward.norms()) == 4
    assert counter.frame_count == 0
    backward.close()
    backward.close()
    assert torch.equal(gradient(close=False), expected)
    backward = OutputGradients(net)
    assert torch.equal(gradient(close=True), expected)
    assert torch.equal(gradient(close=False), expected)
    assert counter.frame_count == 1


def of_outputs(rank: int, world_size: int) -> dict[str, float]:
    torch.manual_seed(0)
    net = MLP(depth=3).double()
    names = {module: name for name, module in net.named_modules()}
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 64, generator=generator, dtype=torch.float64), torch.arange(12) % 10
    share = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    net.eval()  # so that no rank's gradient hangs on another's samples
    backward = OutputGradients(net)
    F.cross_entropy(net(x[share]), y[share]).backward()
    backward.close()
    return {names[layer]: norm for layer, norm in backward.norms().items()}


def test_ranks_norms_are_those_of_one_process(ranks: Ranks) -> None:
    one = ranks.run(of_outputs, world_size=1)[0]
    assert len(one) == 4
    for two in ranks.run(of_outputs, world_size=2):
        assert two == pytest.approx(one, rel=1e-12)


def layer(depth: int, norm: float, shape: tuple[int, ...] = (4, 4)) -> LayerGradient:
    return LayerGradient(f"layer{depth}", depth, norm, 1.0, 1.0, shape)


def test_growth_is_over_the_hidden_layers_of_one_shape() -> None:
    hidden = [layer(depth, 8.0 * 2**-depth) for depth in (1, 2, 4, 5)]  # at 3 is one of another shape
    found = gradient_growth([layer(0, 1e9, (4, 64)), *hidden[:2], layer(3, 1e9, (8, 8)), *hidden[2:], layer(6, 1e9)])
    assert found == pytest.approx({"growth": 2, "decades": 4 * math.log10(2)})
    assert gradient_growth([*hidden[:2], layer(3, 1.0)]) == {}
    assert gradient_growth([layer(0, 1.0)]) == gradient_growth([]) == {}
    for norm in (0.0, math.inf, math.nan):
        assert gradient_growth([*hidden, layer(6, norm), layer(7, 1.0)]) == {}


def test_a_gradient_whose_square_vanishes_in_float32_is_seen() -> None:
    linear = nn.Linear(2, 2)
    linear.weight.grad = torch.full((2, 2), 1e-30)
    assert layer_gradients(nn.Sequential(linear), {})[0].weight_gradient == pytest.approx(2e-30, rel=1e-6, abs=0)


def test_every_n_steps_below_one_is_refused() -> None:
    with refuses("callbacks.gradients.every_n_steps", 0, "use 1 or more, or null"):
        GradientMonitor(every_n_steps=0)
