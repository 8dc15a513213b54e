"""The private parts of torch are there, and mean what they did in torch 2.13."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import vmap
from torch.utils import _python_dispatch, _pytree

from syncbn.nn import torch_internals
from tests.support.private_names import private_names

OWNERS: dict[str, Any] = {
    "_BatchNorm": nn.modules.batchnorm,
    "_NormBase": nn.modules.batchnorm,
    "_ConvNd": nn.modules.conv,
    "_DropoutNd": nn.modules.dropout,
    "_InstanceNorm": nn.modules.instancenorm,
    "_pytree": torch.utils,
    "_python_dispatch": torch.utils,
    "_disable_current_modes": _python_dispatch,
    "_C": torch,
    "_dynamo": torch,
    "_are_functorch_transforms_active": torch._C,
    "_current_level": forward_ad,
    "_functorch": torch._C,
    "_current_graph_task_id": torch._C,
    "_profiler_enabled": torch.autograd,
    "_is_zerotensor": Tensor,
    "_buffers": nn.Linear(1, 1),
    "_forward_pre_hooks": nn.Linear(1, 1),
}
NAMES = private_names(Path(torch_internals.__file__))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(NAMES))
def test_torch_has_the_attribute(name: str) -> None:
    assert hasattr(OWNERS[name], name), name


def test_every_owner_in_the_table_is_used() -> None:
    assert OWNERS.keys() == NAMES


def test_the_base_classes_cover_the_public_layers() -> None:
    pairs = {
        torch_internals.BatchNormBase: (nn.BatchNorm2d, nn.SyncBatchNorm, nn.LazyBatchNorm1d),
        torch_internals.NormBase: (nn.BatchNorm1d, nn.InstanceNorm2d),
        torch_internals.ConvBase: (nn.Conv1d, nn.ConvTranspose3d),
        torch_internals.DropoutBase: (nn.Dropout, nn.AlphaDropout),
        torch_internals.InstanceNormBase: (nn.InstanceNorm1d, nn.LazyInstanceNorm3d),
    }
    assert all(issubclass(layer, base) for base, layers in pairs.items() for layer in layers)


class Mode(torch_internals.TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_are_reported_and_suspended() -> None:
    assert not torch_internals.is_in_dispatch_mode()
    with Mode() as mode:
        assert torch_internals.is_in_dispatch_mode()
        torch.ones(1)
        with torch_internals.without_dispatch_modes():
            torch.ones(1)
    assert mode.calls == 1


def test_transforms_and_forward_mode_are_told_apart() -> None:
    asked: list[tuple[bool, bool]] = []

    def ask(x: Tensor) -> Tensor:
        asked.append((torch_internals.transforms_are_active(), torch_internals.forward_ad_is_active()))
        return x

    ask(torch.ones(1))
    vmap(ask)(torch.ones(2))
    with forward_ad.dual_level():
        ask(torch.ones(1))
    assert asked == [(False, False), (True, False), (False, True)]


def test_a_backward_pass_and_its_batched_gradients_are_reported() -> None:
    asked: list[tuple[bool, bool]] = []

    def ask(dy: Tensor) -> Tensor:
        asked.append((torch_internals.backward_is_running(), torch_internals.is_batched_by_autograd(dy)))
        return dy

    x = torch.ones(2, requires_grad=True)
    x.register_hook(ask)
    ask(torch.ones(2))
    torch.autograd.grad(2 * x, x, torch.ones(2))
    torch.autograd.grad(2 * x, x, torch.ones(3, 2), is_grads_batched=True)
    assert asked == [(False, False), (True, False), (True, True)]


def test_a_zero_tensor_is_reported() -> None:
    assert not torch_internals.is_zero_tensor(torch.zeros(2))
    assert torch_internals.is_zero_tensor(torch._efficientzerotensor(2))


def test_buffers_are_restored_also_those_that_are_none_or_replaced() -> None:
    layer, tracking = nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2)
    assert layer._buffers == dict.fromkeys(("running_mean", "running_var", "num_batches_tracked"))
    mean = tracking.running_mean
    with torch_internals.buffers_restored(nn.Sequential(layer, tracking)):
        layer.running_mean = torch.ones(2)
        mean.add_(1)
        tracking.running_mean = torch.ones(2)
    assert layer.running_mean is None
    assert tracking.running_mean is mean
    assert torch.equal(mean, torch.zeros(2))


def test_forward_pre_hooks_are_listed() -> None:
    def hook(*_: Any) -> None: ...

    layer = nn.Linear(1, 1)
    handle = layer.register_forward_pre_hook(hook)
    assert torch_internals.forward_pre_hooks(layer) == [hook]
    handle.remove()
    assert torch_internals.forward_pre_hooks(layer) == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_original_of_a_compiled_module_has_the_name_that_is_left_out() -> None:
    layer = nn.Linear(1, 1)
    compiled = torch.compile(layer)
    assert getattr(compiled, torch_internals.COMPILED) is layer
    assert [name for name, _ in compiled.named_modules()] == ["", torch_internals.COMPILED]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_compiler_is_reported_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    assert torch_internals.dynamo_is_imported()
    monkeypatch.delitem(sys.modules, torch._dynamo.__name__)
    assert not torch_internals.dynamo_is_imported()


def test_functions_on_nested_collections_are_torchs() -> None:
    assert torch_internals.tree_map(lambda n: n + 1, {"a": [1, 2]}) == {"a": [2, 3]}
    assert torch_internals.tree_leaves({"a": [1, 2]}) == [1, 2]
    assert torch_internals.tree_map is _pytree.tree_map
