"""Schedules, rates of layers and the average of weights against timm's; LAMB and Lion."""

import copy

import lightning.pytorch as pl
import pytest
import timm
import timm.optim
import torch
from hydra.utils import instantiate
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.utils import ModelEmaV3

from syncbn.training import EMA, Cosine, Steps, parameter_groups
from tests.training.support.settled_config import settled

EPOCHS, PER_EPOCH = 8, 5


def an_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", ["cosine", "steps"])
def test_each_value_is_that_of_timm_in_steps(name: str) -> None:
    one, other = an_optimizer(), an_optimizer()
    warm = {"warmup_epochs": 2, "warmup_lr": 1e-4}
    steps = {"warmup_t": 2 * PER_EPOCH, "warmup_lr_init": 1e-4, "t_in_epochs": False}
    if name == "cosine":
        ours = Cosine(one, EPOCHS, interval="step", **warm)
        theirs = CosineLRScheduler(other, t_initial=(EPOCHS - 2) * PER_EPOCH, warmup_prefix=True, **steps)
    else:
        ours = Steps(one, [4, 6], 0.1, interval="step", **warm)
        theirs = MultiStepLRScheduler(
            other, decay_t=[4 * PER_EPOCH + 1, 6 * PER_EPOCH + 1], decay_rate=0.1, warmup_prefix=False, **steps
        )
    ours.steps_per_epoch = PER_EPOCH
    for number in range(EPOCHS * PER_EPOCH):
        theirs.step_update(number)
        assert one.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"], rel=1e-9, abs=1e-12), number
        ours.step()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_rates_of_layers_are_those_of_timm(name: str) -> None:
    network = timm.create_model(name, num_classes=7)
    theirs = timm.optim.param_groups_layer_decay(network, layer_decay=0.75)
    expected = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
    module = pl.LightningModule()
    module.network = network
    ours = parameter_groups(module, layer_decay=0.75)
    assert {id(p): group["lr_scale"] for group in ours for p in group["params"]} == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_that_of_timm(warmup: bool) -> None:
    """timm's counts from the weights before the first step, ours from those after it."""
    module = pl.LightningModule()
    module.network = timm.create_model("test_resnet", num_classes=3)
    ours = EMA(0.9, warmup=warmup)
    ours.update(module)
    theirs = ModelEmaV3(copy.deepcopy(module.network), decay=0.9, use_warmup=warmup)
    for step in range(1, 12):
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn_like(value))
        ours.update(module)
        theirs.update(module.network, step=step + 1)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(ours.average[f"network.{name}"], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lamb", "lion"])
def test_lamb_and_lion(name: str) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = instantiate(settled(f"optimizer={name}").cfg.module.optimizer)([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight < 1).all()
