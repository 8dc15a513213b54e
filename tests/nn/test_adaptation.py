"""Statistics of the test data: a mean of two, over all ranks, and gone without a trace."""

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.nn import torch_internals
from syncbn.nn.simulation import simulate
from tests.nn.support.oracle import CHANNELS, LAYERS, SPATIAL, make_steps, with_parameters
from tests.support.ranks import Messages, Ranks, messages

PRIORS = [0.0, 16.0]
LAYOUTS = {"4d": [torch.channels_last], "5d": [torch.channels_last_3d]}


class Plain2d(nn.BatchNorm2d):
    """A subclass with the parent's forward pass."""


class Own2d(nn.BatchNorm2d):
    """A forward pass of its own, as timm's BatchNormAct2d has."""

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return y * 1.0


KINDS = {
    "torch": lambda: nn.BatchNorm2d(CHANNELS),
    "sync": lambda: syncbn.SyncBatchNorm2d(CHANNELS),
    "any dimension": lambda: syncbn.SyncBatchNorm(CHANNELS),
    "subclass": lambda: Plain2d(CHANNELS),
    "own forward": lambda: Own2d(CHANNELS),
    "own forward, sync": lambda: syncbn.convert(Own2d(CHANNELS)),
    "simulated": lambda: simulate(nn.BatchNorm2d(CHANNELS), 2),
}


def trained(layer: nn.Module) -> nn.Module:
    """In float64, in evaluation mode, with a state that training could have left."""
    with_parameters(layer).double().eval()
    layer.running_mean += torch.tensor([0.5, -1.0, 2.0])
    layer.running_var *= torch.tensor([0.5, 2.0, 4.0])
    return layer


def by_channel(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([piece.movedim(1, 0).flatten(1) for piece in pieces], 1)


def oracle(layer: nn.Module, batches: list[list[Tensor]], prior: float, streaming: bool) -> list[list[Tensor]]:
    """The outputs, by batch and piece, by the formula."""
    outputs = []
    for i, pieces in enumerate(batches):
        seen = [piece for batch in batches[: i + 1] for piece in batch] if streaming else pieces
        n, values = sum(map(len, seen)), by_channel(seen)
        mean, var = (
            prior / (prior + n) * source + n / (prior + n) * batch
            for source, batch in (
                (layer.running_mean, values.mean(1)),
                (layer.running_var, (values - values.mean(1, keepdim=True)).square().mean(1)),
            )
        )
        shape = (1, -1, *[1] * (pieces[0].dim() - 2))
        slope = layer.weight / (var + layer.eps).sqrt()
        outputs.append([(x - mean.view(shape)) * slope.view(shape) + layer.bias.view(shape) for x in pieces])
    return outputs


def batches_of(cuts: list[list[int]], kind: str = "4d", dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    spatial = SPATIAL[kind]
    return [make_steps(cut, spatial, dtype=dtype, seed=seed)[0].x for seed, cut in enumerate(cuts)]


def assert_close(got: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("streaming", [False, True], ids=["batch", "stream"])
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_formula(kind: str, prior: float, streaming: bool) -> None:
    batches = batches_of([[5], [1], [8]], kind)
    layer = trained(LAYERS[kind](CHANNELS))
    right = oracle(layer, batches, prior, streaming)
    for layout in (torch.contiguous_format, *LAYOUTS.get(kind, [])):
        with syncbn.adapt(layer, prior=prior, streaming=streaming):
            for (x,), (expected,) in zip(batches, right, strict=True):
                y = layer(x.contiguous(memory_format=layout))
                assert_close(y, expected)
                assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kind", KINDS)
def test_of_any_kind_of_layer_and_through_a_network(kind: str) -> None:
    net = nn.Sequential(trained(KINDS[kind]()), nn.Tanh(), trained(KINDS[kind]()))
    batches = batches_of([[6], [4]])
    between = [[F.tanh(y) for y in ys] for ys in oracle(net[0], batches, 3.0, False)]
    right = oracle(net[2], between, 3.0, False)
    before = [net.eval()(x) for (x,) in batches]
    with syncbn.adapt(net, prior=3):
        for (x,), (expected,) in zip(batches, right, strict=True):
            assert_close(net(x), expected)
    assert all(torch.equal(net(x), y) for (x,), y in zip(batches, before, strict=True))


def test_without_a_prior_it_is_what_the_layer_does_in_training() -> None:
    ((x,),) = batches_of([[7]])
    layer = trained(nn.BatchNorm2d(CHANNELS))
    with syncbn.adapt(layer):
        assert_close(layer(x), copy.deepcopy(layer).train()(x))


def test_what_a_mask_leaves_out_is_no_sample() -> None:
    ((x,),) = batches_of([[6]])
    layer = trained(syncbn.SyncBatchNorm2d(CHANNELS))
    mask = torch.tensor([True, True, False, True, False, True]).view(-1, 1, 1)
    ((expected,),) = oracle(layer, [[x[mask.flatten()]]], 4.0, False)
    with syncbn.adapt(layer, prior=4):
        assert_close(layer(x, mask)[mask.flatten()], expected)
        assert_close(layer(x, mask=mask)[mask.flatten()], expected)


def adapted(
    rank: int, world_size: int, layer: nn.Module, batches: list[list[Tensor]], options: dict, wrapped: bool
) -> tuple[list[Tensor], Messages]:
    with messages() as sent, syncbn.adapt(DistributedDataParallel(layer) if wrapped else layer, **options):
        return [layer(pieces[rank]) for pieces in batches], sent


CUTS = {2: [[3, 5], [0, 4], [6, 0], [1, 1]], 3: [[2, 0, 3], [1, 4, 2]]}
SENT = ("all_reduce", [2 * CHANNELS + 2], "double")


@pytest.mark.parametrize(("world_size", "options"), [(2, {"prior": 16.0}), (2, {"streaming": True}), (3, {})], ids=str)
def test_ranks_share_what_they_see_in_one_message(ranks: Ranks, world_size: int, options: dict) -> None:
    layer, batches = trained(nn.BatchNorm2d(CHANNELS)), batches_of(CUTS[world_size])
    right = oracle(layer, batches, options.get("prior", 0.0), options.get("streaming", False))
    results = ranks.run(adapted, layer, batches, options, False, world_size=world_size)
    with syncbn.adapt(layer, **options):
        wholes = [layer(torch.cat(pieces)).split([*map(len, pieces)]) for pieces in batches]
    for rank, (outputs, sent) in enumerate(results):
        assert sent.payloads == [SENT] * len(batches)
        for y, expected, whole in zip(outputs, right, wholes, strict=True):
            assert_close(y, expected[rank])
            torch.testing.assert_close(y, whole[rank], rtol=1e-14, atol=1e-14)


def statistics_of(rank: int, world_size: int, layer: nn.Module, pieces: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    with syncbn.adapt(layer, prior=2):
        layer.register_forward_pre_hook(lambda module, _: found.extend([module.running_mean, module.running_var]))
        layer(pieces[rank])
    return found


def test_ranks_normalize_with_the_same_bits(ranks: Ranks) -> None:
    layer = trained(nn.BatchNorm2d(CHANNELS)).float()
    (pieces,) = batches_of([[5, 2, 0]], dtype=torch.float32)
    first, *others = ranks.run(statistics_of, layer, pieces, world_size=3)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert {each.dtype for each in first} == {torch.float32}


@pytest.mark.parametrize(("world_size", "group"), [(1, "world"), (2, 1)])
def test_a_group_of_one_rank_sends_nothing(ranks: Ranks, world_size: int, group: object) -> None:
    layer, batches = trained(syncbn.SyncBatchNorm2d(CHANNELS)), batches_of([[3, 5]])
    for rank, (outputs, sent) in enumerate(
        ranks.run(adapted, layer, batches, {"group": group}, False, world_size=world_size)
    ):
        assert sent.operations == []
        assert_close(outputs[0], oracle(layer, [[batches[0][rank]]], 0.0, False)[0][0])


def test_of_what_ddp_wraps(ranks: Ranks) -> None:
    layer, batches = trained(nn.BatchNorm2d(CHANNELS)), batches_of([[3, 5]])
    results = ranks.run(adapted, layer, batches, {"only": [""]}, True, world_size=2)
    for rank, (outputs, _) in enumerate(results):
        assert_close(outputs[0], oracle(layer, batches, 0.0, False)[0][rank])


@pytest.mark.parametrize("prior", PRIORS)
def test_where_nobody_has_a_sample_it_is_the_source(prior: float) -> None:
    layer, seen = trained(nn.BatchNorm2d(CHANNELS)), []
    with syncbn.adapt(layer, prior=prior, streaming=True):
        layer.register_forward_pre_hook(lambda module, _: seen.append((module.running_mean, module.running_var)))
        assert layer(torch.zeros(0, CHANNELS, 2, 2).double()).shape == (0, CHANNELS, 2, 2)
    ((mean, var),) = seen
    assert torch.equal(mean, layer.running_mean)
    assert torch.equal(var, layer.running_var)


def test_it_leaves_no_trace() -> None:
    net = nn.Sequential(trained(nn.BatchNorm2d(CHANNELS)), trained(syncbn.SyncBatchNorm2d(CHANNELS))).float()
    ((x,),) = batches_of([[5]], dtype=torch.float32)
    buffers, before, hooks = dict(net.named_buffers()), copy.deepcopy(net.state_dict()), [*map(vars, net)]
    hooks = [{name: len(value) for name, value in each.items() if "hooks" in name} for each in hooks]
    y = net(x)
    handle = syncbn.adapt(net, streaming=True)
    for _ in range(2):
        assert not torch.allclose(net(x), y)
        now = net.state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items())
    handle.revert()
    handle.revert()
    assert torch.equal(net(x), y)
    assert all(buffers[name] is buffer for name, buffer in net.named_buffers())
    assert [{k: len(v) for k, v in vars(each).items() if "hooks" in k} for each in net] == hooks


def test_layers_in_training_do_as_always() -> None:
    net = nn.Sequential(trained(nn.BatchNorm2d(CHANNELS)), trained(nn.BatchNorm2d(CHANNELS)))
    net[0].train()
    alone = copy.deepcopy(net)
    ((x,),) = batches_of([[5]])
    with syncbn.adapt(net, prior=1, only="0"):
        assert torch.equal(net(x), alone(x))
    for (name, now), right in zip(net.named_buffers(), alone.buffers(), strict=True):
        assert torch.equal(now, right), name


class Interrupted(nn.BatchNorm2d):
    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_a_forward_pass_that_fails_leaves_the_layer_sound(error: BaseException) -> None:
    layer = trained(Interrupted(CHANNELS))
    mean, var = layer.running_mean, layer.running_var
    ((x,),) = batches_of([[5]])
    ((expected,),) = oracle(layer, [[x]], 0.0, False)
    with syncbn.adapt(layer):
        layer.error = error
        with pytest.raises(type(error)):
            layer(x)
        if isinstance(error, Exception):
            assert layer.running_mean is mean
        layer.error = None
        assert_close(layer(x), expected)
        layer.error = error
        with pytest.raises(type(error)):
            layer(x)
    assert layer.running_mean is mean
    assert layer.running_var is var


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 5, 2, 2), torch.zeros(4), torch.zeros(3, 3, 3)], ids=lambda x: str(x.shape)
)
def test_what_is_no_input_is_for_the_layer_to_refuse(x: Tensor) -> None:
    layer = trained(nn.BatchNorm2d(CHANNELS))
    with pytest.raises((ValueError, RuntimeError)) as alone:
        layer(x.double())
    with syncbn.adapt(layer), pytest.raises(type(alone.value), match=r"(?s).*") as other:
        layer(x.double())
    assert str(other.value) == str(alone.value)


def test_a_copy_is_adapted_by_itself() -> None:
    layer = trained(nn.BatchNorm2d(CHANNELS))
    first, second = batches_of([[5], [3]])
    with syncbn.adapt(layer, streaming=True):
        layer(*first)
        other = copy.deepcopy(layer)
        layer(*second)
    assert_close(other(*second), oracle(layer, [first, second], 0.0, True)[1][0])


@pytest.mark.parametrize("compiled_first", [True, False])
def test_compiled_code_has_no_way_around_it(monkeypatch: pytest.MonkeyPatch, compiled_first: bool) -> None:
    layer = trained(nn.BatchNorm2d(CHANNELS))
    ((x,),) = batches_of([[5]])
    ((expected,),) = oracle(layer, [[x]], 0.0, False)
    alone, calls = layer(x), []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    if compiled_first:
        net = torch.compile(nn.Sequential(layer), backend=backend)
        net(x)
    else:  # as in a process that has compiled nothing yet
        monkeypatch.setattr(torch_internals, "sys", SimpleNamespace(modules={}))
    with syncbn.adapt(layer):
        if not compiled_first:
            net = torch.compile(nn.Sequential(layer), backend=backend)
        assert_close(net(x), expected)
    assert torch.equal(net(x), alone)
    assert calls


def test_compiled_code_runs_eagerly_until_the_last_is_reverted() -> None:
    first, second = (syncbn.adapt(trained(nn.BatchNorm2d(CHANNELS))) for _ in range(2))
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(torch.compiler.is_compiling())
        return x * 2

    net = torch.compile(double, backend="eager")
    for revert in (first.revert, first.revert, second.revert):
        net(torch.ones(2))
        revert()
    assert calls == [False] * 3
    net(torch.ones(2))
    assert calls != [False] * 4


def test_activation_checkpointing_counts_no_batch_twice() -> None:
    layer = trained(nn.BatchNorm2d(CHANNELS))
    ((x,),) = batches_of([[5]])
    x.requires_grad_()
    with syncbn.adapt(layer, prior=1):
        (right,) = torch.autograd.grad(layer(x).square().sum(), x)
        (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(right, again)
    with syncbn.adapt(layer, streaming=True), pytest.raises(RuntimeError, match="use streaming=False"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prior": -1}, r"prior=-1: use a number of samples, 0 \(the batch alone\) or more"),
        ({"prior": float("nan")}, "prior=nan: use a number"),
        ({"prior": True}, "prior=True: use a number"),
        ({"group": 0}, "group=0: a group has at least 1 rank"),
        ({"only": "nothing"}, "no batch norm layer to adapt that has running statistics"),
        ({"only": "2"}, "no batch norm layer to adapt that has running statistics"),
        ({"only": ["1", "0"]}, "adapt: 0 is adapted already"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_and_leaves_nothing(options: dict, line: str) -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    with syncbn.adapt(net, only="0"):
        with pytest.raises(ValueError, match=line):
            syncbn.adapt(net, **options)
        assert not net[1]._forward_pre_hooks
    syncbn.adapt(net).revert()
