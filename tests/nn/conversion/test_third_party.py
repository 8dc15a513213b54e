"""Batch norm classes of somebody's own keep their forward pass, with what is inside synchronized, or are refused."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.nn.modules import Synchronized
from tests.nn.support.own_forward import NormAct, Split
from tests.support.ranks import Ranks


class ByItself(nn.BatchNorm2d):
    """Calls the function itself, as timm's BatchNormAct2d does, and takes an argument of its own."""

    def __init__(self, channels: int, slope: float = 0.1) -> None:
        super().__init__(channels)
        self.slope = slope

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.leaky_relu(-x if flip else x, self.slope)


class Plain(nn.BatchNorm2d):
    """Only its constructor is its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


class Hidden(nn.BatchNorm2d):
    """Does batch norm by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean((0, 2, 3), keepdim=True)) * self.weight.view(1, -1, 1, 1)


class Sometimes(nn.BatchNorm2d):
    """Names the function and does not call it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True) if x.shape[0] > 99 else x


class TorchsOwn(nn.SyncBatchNorm):
    """What timm's conversion to torch's synchronized layers makes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


KINDS = [NormAct, ByItself, Plain]


def data() -> Tensor:
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def part(rank: int, world_size: int, kind: type[nn.BatchNorm2d]) -> tuple[Tensor, ...]:
    layer = syncbn.convert(kind(3).double())
    x = data().split([3, 5])[rank].clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var, layer.num_batches_tracked


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_stays_and_its_batch_norm_is_synchronized(ranks: Ranks, kind: type[nn.BatchNorm2d]) -> None:
    one, x = kind(3).double(), data().requires_grad_()
    y = one(x)
    y.square().sum().backward()
    parts = ranks.run(part, kind, world_size=2)
    ys, dxs, dws, *buffers = zip(*parts, strict=True)
    torch.testing.assert_close(torch.cat(ys), y.detach())
    torch.testing.assert_close(torch.cat(dxs), x.grad)
    torch.testing.assert_close(sum(dws), one.weight.grad)
    for (first, second), expected in zip(buffers, one.buffers(), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_reverts_without_a_trace(kind: type[nn.BatchNorm2d]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), kind(3))
    before = set(net[1].__dict__)
    syncbn.convert(net, group=2)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False), net):
        assert isinstance(other[1], Synchronized)
        assert other[1].group == 2
        assert syncbn.revert(other) is other
        assert type(other[1]) is kind
        assert set(other[1].__dict__) == before
        assert list(other.state_dict()) == list(net.state_dict())


def halves(rank: int, world_size: int, only: str | None) -> dict[str, Tensor]:
    layer = syncbn.convert(Split(3).double(), only=only)
    layer(data().chunk(world_size)[rank])
    return dict(layer.named_buffers())


@pytest.mark.parametrize("only", [None, ""], ids=["all", "but the one within"])
def test_a_batch_norm_within_is_synchronized_if_it_was_chosen(ranks: Ranks, only: str | None) -> None:
    first, second = ranks.run(halves, only, world_size=2)
    assert torch.equal(first["running_mean"], second["running_mean"])
    assert torch.equal(first["aux.running_mean"], second["aux.running_mean"]) == (only is None)
    quarters = data().unflatten(0, (2, 2, -1))  # by rank and by half
    torch.testing.assert_close(first["running_mean"], 0.1 * quarters[:, 0].mean((0, 1, 3, 4)))
    of_first = quarters[:, 1] if only is None else quarters[:1, 1]
    torch.testing.assert_close(first["aux.running_mean"], 0.1 * of_first.mean((0, 1, 3, 4)))


def compiled(rank: int, world_size: int, kind: type[nn.BatchNorm2d]) -> None:
    torch._dynamo.reset()
    results = []
    for compile in (lambda layer: layer, lambda layer: torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer, x = syncbn.convert(kind(3).double()), data().split([3, 5])[rank].clone().requires_grad_()
        y = compile(layer)(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()])
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_in_one_graph(ranks: Ranks, kind: type[nn.BatchNorm2d]) -> None:
    ranks.run(compiled, kind, world_size=2)


def test_an_argument_of_its_own_gets_through_and_evaluation_is_untouched() -> None:
    layer, x = ByItself(3), data().float()
    expected = copy.deepcopy(layer).eval()(x, flip=True)
    assert torch.equal(syncbn.convert(layer).eval()(x, flip=True), expected)


def test_a_parametrized_layer_is_synchronized_and_given_back() -> None:
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    kind, x = type(layer), data().float()
    expected = copy.deepcopy(layer)(x)
    syncbn.convert(layer)
    assert isinstance(layer, Synchronized)
    torch.testing.assert_close(layer(x), expected)
    assert type(syncbn.revert(layer)) is kind


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Hidden(3), "nothing in it to synchronize"),
        (nn.LazyBatchNorm2d(), "run a batch through the model first"),
        (TorchsOwn(3), "convert the model before it gets such layers"),
    ],
)
def test_what_cannot_be_synchronized_is_refused_by_name_and_the_model_untouched(layer: nn.Module, why: str) -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(layer))
    with pytest.raises(TypeError, match=rf"1\.0 is a {type(layer).__name__}: .*{why}.*only="):
        syncbn.convert(net)
    assert type(net[0]) is nn.BatchNorm2d
    syncbn.convert(net, only="0")
    assert type(net[0]) is syncbn.SyncBatchNorm2d


def test_ghost_batches_of_a_forward_pass_of_its_own_are_refused() -> None:
    with pytest.raises(TypeError, match="cannot be cut into ghost batches"):
        syncbn.convert(NormAct(3), ghost_batch=2)


def test_an_object_with_a_forward_pass_of_its_own_is_refused() -> None:
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    with pytest.raises(TypeError, match="this one object has a forward pass of its own"):
        syncbn.convert(layer)


def not_called(rank: int, world_size: int) -> str:
    with pytest.raises(RuntimeError) as caught:
        syncbn.convert(Sometimes(3))(torch.randn(2, 3, 4, 4))
    return str(caught.value)


def test_a_forward_pass_that_did_not_normalize_says_so() -> None:
    assert "Sometimes did not call torch.nn.functional.batch_norm" in not_called(0, 1)


def test_a_checkpointed_subclass_counts_a_batch_once() -> None:
    layer = syncbn.convert(ByItself(3))
    x = data().float().requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 1
    expected = 0.1 * x.detach().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, expected)


class Activates(nn.BatchNorm2d):
    """Has an activation by the name that ours has for its own, as timm's BatchNormAct2d does."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(super().forward(x))
        return result


class Says(nn.BatchNorm2d):
    """Has a word by that name, for somebody else."""

    act = "leaky_relu"


@pytest.mark.parametrize("kind", [Activates, Says])
def test_an_attribute_called_act_stays_whose_it_is(kind: type[nn.BatchNorm2d]) -> None:
    torch.manual_seed(0)
    layer, x = kind(3), torch.randn(4, 3, 2, 2)
    act, expected = layer.act, layer(x)
    assert syncbn.convert(layer).act is act
    torch.testing.assert_close(layer(x), expected)
    assert syncbn.revert(layer).act is act
