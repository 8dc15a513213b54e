"""The MLP's options: what each draws, and that the defaults draw what they drew before there were options."""

import math

import pytest
import torch
from torch import nn

from syncbn.training import MLP
from syncbn.training.norm.replace import remove_batch_norm
from tests.support.refuses import refuses


def hidden(net: MLP) -> list[nn.Linear]:
    return [layer for layer in net.body if isinstance(layer, nn.Linear)]


def drawn(**options: object) -> MLP:
    torch.manual_seed(3)
    return MLP(depth=6, width=256, in_features=256, **options)  # type: ignore[arg-type]


def test_the_defaults_are_the_network_and_the_draws_of_before() -> None:
    torch.manual_seed(3)
    net = MLP(depth=2, width=8)
    after = torch.rand(3)
    torch.manual_seed(3)
    sizes = [(64, 8), (8, 8)]
    layers = [m for n, w in sizes for m in (nn.Linear(n, w, bias=False), nn.BatchNorm1d(w), nn.ReLU(inplace=True))]
    body, head = nn.Sequential(*layers), nn.Linear(8, 10)
    for layer in (body[0], body[3], head):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(head.bias)
    assert torch.equal(after, torch.rand(3))
    assert str(net.body) == str(body)
    expected = nn.ModuleDict({"body": body, "head": head}).state_dict()
    assert list(net.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("activation", "kind", "gain"),
    [("relu", nn.ReLU, math.sqrt(2)), ("tanh", nn.Tanh, 5 / 3), ("sigmoid", nn.Sigmoid, 1.0)],
)
def test_he_draws_by_the_gain_of_the_activation(activation: str, kind: type, gain: float) -> None:
    net = drawn(activation=activation)
    assert [type(layer) for layer in net.body[2::3]] == [kind] * 6
    for layer in (*hidden(net), net.head):
        assert layer.weight.std().item() == pytest.approx(gain / 16, rel=0.05)
    assert not net.head.bias.any()


def test_torch_draws_as_its_linear_does() -> None:
    net = drawn(init="torch")
    for layer in (*hidden(net), net.head):
        assert layer.weight.abs().max().item() == pytest.approx(1 / 16, rel=0.01)
    assert net.head.bias.all()
    remove_batch_norm(net)
    assert not any(layer.bias.any() for layer in hidden(net))


@pytest.mark.parametrize("init", ["he", "torch"])
def test_gain_is_a_factor_on_the_hidden_layers_alone(init: str) -> None:
    plain, large = drawn(init=init), drawn(init=init, gain=10)
    for before, after in zip(hidden(plain), hidden(large), strict=True):
        torch.testing.assert_close(after.weight, 10 * before.weight)
        assert after.weight.requires_grad
    assert torch.equal(plain.head.weight, large.head.weight)
    assert torch.equal(plain.head.bias, large.head.bias)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("activation", "gelu", "use relu, sigmoid or tanh"),
        ("init", "xavier", "use he, or torch for "),
        ("gain", 0, "use a number above 0; "),
        ("gain", float("nan"), "use a number above 0; "),
        ("gain", "large", "use a number above 0; "),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: object, words: str) -> None:
    expected = value if isinstance(value, str) else pytest.approx(value, nan_ok=True)
    with refuses(f"model.{name}", expected, words):
        drawn(**{name: value})
