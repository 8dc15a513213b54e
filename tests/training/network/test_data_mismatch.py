"""A network that does not fit its data is one line that names the setting, in the first step or before."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from syncbn.training.errors import AgreedError
from syncbn.training.network.data_mismatch import explained
from tests.support.refuses import refuses
from tests.training.support.settled_config import settled
from tests.training.support.train_command import train

MODEL = OmegaConf.create({"model": {"in_channels": 3, "in_features": 63, "num_classes": 5, "width": 63}})


def raised(function: nn.Module, *inputs: torch.Tensor) -> Exception:
    with pytest.raises((RuntimeError, IndexError)) as caught:
        function(*inputs)
    return caught.value


def test_torchs_messages_are_read() -> None:
    images, features, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, 64), torch.tensor([0, 7])
    with refuses("model.in_channels", 3, "the images of the data have 1 channels; use 1", kind=AgreedError):
        raise explained(raised(nn.Conv2d(3, 4, 3), images), MODEL) or AssertionError
    with refuses("model.in_features", 63, "a sample of the data has 64 numbers; use 64", kind=AgreedError):
        raise explained(raised(nn.Linear(63, 4), features), MODEL) or AssertionError
    with refuses("model.num_classes", 5, "the label 7, and labels count from 0 to 4; use 8 or more"):
        raise explained(raised(nn.CrossEntropyLoss(), torch.zeros(2, 5), labels), MODEL) or AssertionError


@pytest.mark.parametrize(
    "model",
    [{}, {"in_channels": 4}, {"in_channels": 3, "out_channels": 3}, {"in_channels": True}],
)
def test_what_no_setting_explains_stays_torchs_error(model: dict[str, int]) -> None:
    error = raised(nn.Conv2d(3, 4, 3), torch.zeros(2, 1, 8, 8))
    assert explained(error, OmegaConf.create({"model": model})) is None
    assert explained(error, DictConfig({"model": None})) is None
    assert explained(RuntimeError("another"), MODEL) is None


def test_facts_of_the_data_are_compared_before_ranks_start() -> None:
    with refuses("model.in_channels", 3, "the images of these data have 1 channel; leave it out, or use 1"):
        settled("model.in_channels=3")
    with refuses("model.num_classes", 5, "these data have 10 classes; leave it out, or use 10"):
        settled("model.num_classes=5")
    with refuses("model.num_classes", 5, "these data have 10 classes"):
        settled("model=mlp", "model.num_classes=5")
    settled("model.num_classes=20")  # outputs that no label uses


def test_a_run_ends_in_its_first_step(tmp_path: Path) -> None:
    run = train(tmp_path, "model=mlp", "model.in_features=63", "logger=csv").ended(1)
    assert run.err == "error: model.in_features=63: a sample of the data has 64 numbers; use 64\n"
    assert "epoch" not in run.out
