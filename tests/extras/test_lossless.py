"""Models of timm and torchvision go through ``convert`` and ``revert`` without loss."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import syncbn
from syncbn.nn.modules import OPTIONS, Synchronized
from tests.extras.support import zoo
from tests.extras.support.zoo import Entry
from tests.support.model_snapshot import Snapshot, snapshot


def test_every_family_of_timm_is_in_one_of_the_lists() -> None:
    assert set(timm.list_modules()) == zoo.TIMM.keys() | zoo.WITHOUT
    assert not zoo.TIMM.keys() & zoo.WITHOUT


@pytest.mark.parametrize("entry", zoo.RUN, ids=str)
def test_a_model_there_and_back_computes_the_same_to_the_bit(entry: Entry) -> None:
    model, x = zoo.build(entry), zoo.batch(entry, 2)
    with torch.inference_mode():
        expected = tree_leaves(model(x))
        there_and_back(model, check=lambda: all(map(torch.equal, tree_leaves(model(x)), expected)))


@pytest.mark.parametrize("entry", zoo.LOOKED_AT, ids=str)
def test_a_model_that_is_only_looked_at_there_and_back(entry: Entry) -> None:
    with torch.device("meta"):
        there_and_back(zoo.build(entry), check=lambda: True)


def there_and_back(model: nn.Module, check: Callable[[], bool]) -> None:
    next(layer for layer in model.modules() if isinstance(layer, _BatchNorm)).register_forward_hook(lambda *_: None)
    before, keys = snapshot(model), list(model.state_dict())
    syncbn.convert(model)
    assert_converted(before, snapshot(model))
    assert list(model.state_dict()) == keys
    assert check()
    syncbn.revert(model)
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys
    assert check()


def assert_converted(before: Snapshot, after: Snapshot) -> None:
    """Every batch norm is ours and still of the class it was; but for our settings nothing else has changed."""
    assert before.keys() == after.keys()
    for name, (kind, attributes) in before.items():
        now, held = after[name]
        if issubclass(kind, _BatchNorm):
            assert issubclass(now, Synchronized), f"{name}, a {kind.__qualname__}, was left out"
            assert issubclass(now, kind)
            held = {key: value for key, value in held.items() if key not in {*OPTIONS, "name_in_model"}}
        else:
            assert now is kind, name
        assert held == attributes, name
