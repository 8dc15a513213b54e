from functools import partial

import pytest
import torch
from torch import nn

from syncbn.training.models.classifier import Classifier, parameter_groups
from syncbn.training.models.networks import MLP, ResNet


@pytest.mark.parametrize("network", [ResNet(), MLP()])
def test_normalization_layers_do_not_decay(network: nn.Module) -> None:
    decayed, spared = parameter_groups(network)
    assert "weight_decay" not in decayed
    assert spared["weight_decay"] == 0.0
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {id(p) for p in spared["params"]} == {id(p) for m in norms for p in m.parameters()}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(network.parameters()))


def test_the_decay_of_norms_can_be_switched_on() -> None:
    (group,) = parameter_groups(MLP(), decay_norm=True)
    assert len(group["params"]) == len(list(MLP().parameters()))


@pytest.mark.parametrize(("decay_norm", "decays"), [(False, [0.1, 0.0]), (True, [0.1])])
def test_the_classifier_gives_its_optimizer_these_groups(decay_norm: bool, decays: list[float]) -> None:
    sgd = partial(torch.optim.SGD, lr=1.0, weight_decay=0.1)
    optimizer = Classifier(MLP(), sgd, num_classes=10, decay_norm=decay_norm).configure_optimizers()
    assert [group["weight_decay"] for group in optimizer.param_groups] == decays


def test_frozen_parameters_are_left_out() -> None:
    network = MLP()
    network.body[0].weight.requires_grad_(False)
    assert sum(len(g["params"]) for g in parameter_groups(network)) == len(list(network.parameters())) - 1


def test_a_loss_that_is_nan_makes_the_mean_loss_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Classifier(MLP(), partial(torch.optim.SGD, lr=1.0), num_classes=10)
    monkeypatch.setattr(module, "log", lambda *_, **__: None)  # there is no trainer
    images = torch.rand(4, 1, 8, 8)
    images[0, 0, 0, 0] = float("nan")
    module.eval()
    for batch in (torch.rand(6, 1, 8, 8), images):
        module.validation_step((batch, torch.zeros(len(batch), dtype=torch.long)), 0)
    assert module.val_mean_loss.compute().isnan()
    assert module.val_acc.compute().isfinite()


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_resnet_takes_images_of_8_to_32(size: int) -> None:
    assert ResNet(in_channels=3, blocks=[1, 2, 1])(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_he_initialization_keeps_the_signal_without_norm() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    for layer in MLP(depth=8, width=512).body:  # torch's default loses a factor of 6 a layer
        if not isinstance(layer, nn.BatchNorm1d):
            x = layer(x)
    assert 0.5 < x.square().mean() < 2
