"""Batch norm that is in no layer of torch's class is named when a model is converted, and may be left out."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.nn import simulation
from syncbn.nn.modules import Synchronized

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning"),  # torch.export.unflatten, torch 2.13
]


class Statistics(nn.Module):
    """Running statistics of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))


class HasALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)


class Calls(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class CallsByAMethod(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x)

    def normalized(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training)


class CallsWithAll(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        given = (x, self.running_mean, self.running_var)
        return F.batch_norm(*given, training=True)


class CallsTorchs(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, None, None, self.running_mean, self.running_var, self.training, 0.1, 1e-5, False)


class CallsWithoutWeights(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        where = (self.running_mean, self.running_var)
        return torch.ops.aten.batch_norm(x, None, None, where[0], where[1], self.training, 0.1, 1e-5, False)


class CallsNative(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        found = torch.native_batch_norm(x, None, None, self.running_mean, self.running_var, self.training, 0.1, 1e-5)
        return found[0]


class Inherits(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class InheritsByName(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return Calls.forward(self, x).relu()


class CallsByAnotherName(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        norm = F.batch_norm
        return norm(x, self.running_mean, self.running_var, training=self.training)


class HandsOn(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(F.batch_norm, x, self.running_mean, self.running_var, None, None, True, use_reentrant=False)


def helper(x: Tensor, layer: nn.Module) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, training=layer.training)


class CallsAHelper(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x, self)


class GoesRoundByAHelper(HasALayer):
    def forward(self, x: Tensor) -> Tensor:
        return helper(x, self.norm)


class GoesRoundByTheClass(GoesRoundByAHelper):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self.norm, x)


alias = F.batch_norm


class CallsAnAlias(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return alias(x, self.running_mean, self.running_var, training=self.training)


class CallsByAProperty(Statistics):
    @property
    def norm(self) -> Callable[[Tensor], Tensor]:
        return lambda x: helper(x, self)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class CallsByATable(Statistics):
    KINDS: ClassVar = {"batch": F.batch_norm}

    def forward(self, x: Tensor) -> Tensor:
        return self.KINDS["batch"](x, self.running_mean, self.running_var, training=self.training)


class OfAutograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, training=True)


class CallsByAutograd(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return OfAutograd.apply(x, self.running_mean, self.running_var)


class Stores(Statistics):
    """Calls what it was given."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.running_mean, self.running_var)


def scripted(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, None, None, True)


def closed_over() -> nn.Module:
    norm = F.batch_norm
    return Stores(lambda x, mean, var: norm(x, mean, var, training=True))


class GoesRound(HasALayer):
    """Takes the values of a layer, and not its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training)


class Frozen(Statistics):
    """As detectron2 has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=False)


class FrozenByDefault(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var)


class FrozenByHand(Statistics):
    """As torchvision has it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean.view(1, -1, 1, 1)) * self.running_var.rsqrt().view(1, -1, 1, 1)


class Standardized(nn.Conv2d):
    """Normalizes its weight, as timm's StdConv2d does."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        return F.conv2d(x, F.batch_norm(rows, None, None, training=True).reshape_as(self.weight))


class NamesALayerSo(nn.Module):
    """A layer of torch's, by the name of the operator, of which more is asked than to be called."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.batch_norm
        return norm(x) if self.batch_norm.affine else self.batch_norm(x)


class CallsSyncbn(HasALayer):
    """A model for layers that may be converted or not, as those of this package."""

    def forward(self, x: Tensor) -> Tensor:
        return syncbn.norm_act(self.norm, x)


class HasAGraph(nn.Module):
    """A property of this name that is not there yet, and no graph of torch.fx."""

    @property
    def graph(self) -> None:
        raise RuntimeError("not built")

    def forward(self, x: Tensor) -> Tensor:
        return x


class AsksForAForward(HasALayer):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if type(self.norm).forward is nn.BatchNorm2d.forward else self.norm(x).relu()


class OverridesAll(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class CallsAFrozenHelper(Statistics):
    def forward(self, x: Tensor) -> Tensor:
        return frozen_helper(x, self)


def frozen_helper(x: Tensor, layer: nn.Module) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, training=False)


class ByHand(Statistics):
    """Another normalization that learns, as InplaceABN."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
        return x - self.running_mean.view(1, -1, 1, 1)


def within() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def exported(train: bool) -> nn.Module:
    return torch.export.export(within().train(train), (torch.randn(2, 4, 3, 3),)).module()


def unflattened() -> nn.Module:
    return torch.export.unflatten(torch.export.export(within(), (torch.randn(2, 4, 3, 3),)))


def patched() -> nn.Module:
    module, own = nn.Identity(), Calls()
    module.forward = lambda x: F.batch_norm(x, own.running_mean, own.running_var, training=True)
    return module


def compiled_from_a_string() -> nn.Module:
    space = {"F": F, "Statistics": Statistics, "Tensor": Tensor}
    exec(
        "class NoSource(Statistics):\n"
        "    def forward(self, x): return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)",
        space,
    )
    return space["NoSource"]()


def traced() -> nn.Module:
    return torch.jit.trace(within(), torch.randn(2, 4, 3, 3), check_trace=False)


CALL_IT = (
    *(Calls, CallsByAMethod, CallsWithAll, CallsTorchs, CallsWithoutWeights, CallsNative, Inherits, InheritsByName),
    *(CallsByAnotherName, HandsOn, CallsAHelper, CallsAnAlias, CallsByAProperty, CallsByATable, CallsByAutograd),
    *(GoesRound, GoesRoundByAHelper, GoesRoundByTheClass),
)
HIDDEN: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    **{kind.__name__: (kind, "1.0", kind.__name__) for kind in CALL_IT},
    "scripted": (lambda: torch.jit.script(within()), "1.0.1", "BatchNorm2d"),
    "scripted for evaluation": (lambda: torch.jit.script(within().eval()), "1.0.1", "BatchNorm2d"),
    "scripted call": (lambda: torch.jit.script(Calls()), "1.0", "Calls"),
    "traced": (traced, "1.0.1", "BatchNorm2d"),
    "fx": (lambda: torch.fx.symbolic_trace(Calls()), "1.0", "Calls"),
    "exported": (lambda: exported(True), "1.0", "GraphModule"),
    "exported for evaluation": (lambda: exported(False), "1.0", "GraphModule"),
    "unflattened": (unflattened, "1.0.1", "InterpreterModule"),
    "stores": (lambda: Stores(F.batch_norm), "1.0", "Stores"),
    "stores a partial": (lambda: Stores(partial(F.batch_norm, training=True)), "1.0", "Stores"),
    "stores a scripted function": (lambda: Stores(torch.jit.script(scripted)), "1.0", "Stores"),
    "stores a closure": (closed_over, "1.0", "Stores"),
    "no source": (compiled_from_a_string, "1.0", "NoSource"),
    "patched": (patched, "1.0", "Identity"),
}
PASSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "frozen": (Frozen, []),
    "frozen by default": (FrozenByDefault, []),
    "frozen by hand": (FrozenByHand, []),
    "scripted, frozen by hand": (lambda: torch.jit.script(FrozenByHand()), []),
    "scripted, other": (lambda: torch.jit.script(nn.Conv2d(4, 4, 1)), []),
    "scripted, no forward": (lambda: torch.jit.script(nn.ModuleList([nn.ReLU()])), []),
    "standardized weights": (lambda: Standardized(4, 4, 1), []),
    "named as the operator": (NamesALayerSo, ["1.0.batch_norm"]),
    "calls syncbn": (CallsSyncbn, ["1.0.norm"]),
    "has a graph": (HasAGraph, []),
    "asks for a forward": (AsksForAForward, ["1.0.norm"]),
    "overrides all": (OverridesAll, []),
    "frozen helper": (CallsAFrozenHelper, []),
    "stores another function": (lambda: Stores(torch.lerp), []),
    "instance norm": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), []),
    "fx": (lambda: torch.fx.symbolic_trace(within()), ["1.0.1"]),
    "compiled": (lambda: torch.compile(within()), ["1.0._orig_mod.1"]),
    "parallel": (lambda: nn.DataParallel(within()), ["1.0.module.1"]),
}


def a_net(part: nn.Module) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(part))


def synchronized(net: nn.Module) -> list[str]:
    return [name for name, layer in net.named_modules() if isinstance(layer, Synchronized)]


@pytest.mark.parametrize("which", HIDDEN)
def test_hidden_batch_norm_is_refused_by_name_and_can_be_left_out(which: str) -> None:
    make, name, kind = HIDDEN[which]
    net = a_net(make())
    for change in (syncbn.convert, lambda net: simulation.simulate(net, 2), syncbn.adapt):
        with pytest.raises(TypeError) as caught:
            change(net)
        assert str(caught.value).startswith(f"{name} is a {kind}: ")
        assert str(caught.value).endswith("Or leave it out: only=lambda name, module: ...")
        assert "\n" not in str(caught.value)
        assert type(net[0]) is nn.BatchNorm2d
    syncbn.convert(net, only=lambda each, module: each != name)
    assert "0" in synchronized(net)
    syncbn.revert(net)
    assert synchronized(net) == []
    assert synchronized(syncbn.convert(net, only=["0"])) == ["0"]


@pytest.mark.parametrize("which", PASSED)
def test_what_has_no_batch_norm_that_learns_is_left_as_it_is(which: str) -> None:
    make, names = PASSED[which]
    net = syncbn.convert(a_net(make()))  # a warning would be an error
    assert synchronized(net) == ["0", *names]


def test_a_predicate_on_attributes_of_batch_norms_leaves_out_no_other_class() -> None:
    def wide(name: str, module: nn.Module) -> bool:
        return module.num_features >= 4

    with pytest.raises(TypeError, match=r"1\.0 is a Calls"):
        syncbn.convert(a_net(Calls()), only=wide)
    with pytest.warns(UserWarning, match=r"1\.0 is a ByHand"):
        assert synchronized(syncbn.convert(a_net(ByHand()), only=wide)) == ["0"]


@pytest.mark.parametrize("other", [None, [nn.BatchNorm2d(4)], nn.BatchNorm2d])
def test_what_is_no_module_is_refused(other: Any) -> None:
    with pytest.raises(TypeError, match=r"^convert takes a torch\.nn\.Module, got "):
        syncbn.convert(other)


@pytest.mark.parametrize("name", ["running_var", "moving_mean"])
def test_another_normalization_with_one_statistic_is_named_in_a_warning(name: str) -> None:
    class OneStatistic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.training else x

    part = OneStatistic()
    part.register_buffer(name, torch.ones(4))
    with pytest.warns(UserWarning, match=r"1\.0 is a .*OneStatistic: it has running statistics"):
        syncbn.convert(a_net(part))


def test_another_normalization_that_learns_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"1\.0 is a ByHand: it has running statistics"):
        net = syncbn.convert(a_net(ByHand()))
    assert synchronized(net) == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(a_net(ByHand()), only="0")
