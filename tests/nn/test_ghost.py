"""Ghost batches: each chunk of the local batch is a batch of its own; running statistics move once; nothing is sent."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.testing import force_exchange
from tests.nn.support.oracle import CHANNELS, LAYERS, SPATIAL, each_option, make_steps
from tests.nn.support.oracle import close as assert_close
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Messages, Ranks, messages

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Samples, ghost_batch, and the chunks these make: a rest joins the chunk before.
CHUNKS = [(8, 4, [4, 4]), (10, 4, [4, 6]), (3, 4, [3]), (11, 4, [4, 7]), (12, 4, [4, 4, 4]), (7, 2, [2, 2, 3])]


class Ghosts:
    """The oracle: one torch batch norm in float64 per chunk, and the running statistics from their means."""

    def __init__(self, layer: nn.Module) -> None:
        state = deepcopy(layer.state_dict())
        self.momentum = layer.momentum
        self.twin = nn.BatchNorm1d(
            CHANNELS, layer.eps, affine=layer.affine, track_running_stats=False, dtype=torch.float64
        )
        self.twin.load_state_dict({name: state[name] for name in self.twin.state_dict()})
        self.mean, self.var = state["running_mean"].double(), state["running_var"].double()
        self.batches = 0

    def __call__(self, x: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(len(x), *x.shape[2:], dtype=torch.bool) if mask is None else mask
        mask = mask.expand(len(x), *x.shape[2:])
        y, means, variances = [], [], []
        for chunk, keep in zip(x.movedim(1, -1).split(sizes), mask.split(sizes), strict=True):
            whole = torch.zeros_like(chunk)
            if keep.any():
                whole[keep] = self.twin(chunk[keep])
                means.append(chunk[keep].mean(0).detach())
                variances.append(chunk[keep].var(0).detach())
            y.append(whole.movedim(-1, 1))
        self.batches += 1
        momentum = 1 / self.batches if self.momentum is None else self.momentum
        self.mean = (1 - momentum) * self.mean + momentum * torch.stack(means).mean(0)
        self.var = (1 - momentum) * self.var + momentum * torch.stack(variances).mean(0)
        return torch.cat(y)


def compare(
    layer: nn.Module, sizes: list[int], kind: str, tolerance: float, *, masked: bool = False, count: int = 1
) -> None:
    expected = Ghosts(layer)
    generator = torch.Generator().manual_seed(4)
    dtype = layer.running_mean.dtype
    for step in make_steps([sum(sizes)], SPATIAL[kind], count=count, dtype=dtype):
        x = step.x[0].requires_grad_()
        double = step.x[0].detach().double().requires_grad_()
        mask = torch.rand(len(x), *x.shape[2:], generator=generator) < 0.7 if masked else None
        given = x if mask is None else x.masked_fill(~mask.unsqueeze(1), float("nan"))
        y, right = layer(given, mask), expected(double, sizes, mask)
        y.backward(step.dy[0])
        right.backward(step.dy[0].double())
        assert_close(y, right, tolerance, "y")
        assert_close(x.grad, double.grad, tolerance, "dx")
    if layer.affine:
        assert_close(layer.weight.grad, expected.twin.weight.grad, tolerance, "dgamma")
        assert_close(layer.bias.grad, expected.twin.bias.grad, tolerance, "dbeta")
    assert_close(layer.running_mean, expected.mean, tolerance, "running_mean")
    assert_close(layer.running_var, expected.var, tolerance, "running_var")
    assert layer.num_batches_tracked == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("samples", "ghost_batch", "sizes"), CHUNKS, ids=str)
def test_each_chunk_is_a_batch_and_the_running_statistics_move_once_by_their_means(
    samples: int, ghost_batch: int, sizes: list[int], kind: str, dtype: torch.dtype
) -> None:
    assert sum(sizes) == samples
    layer = parameters(LAYERS[kind](CHANNELS, ghost_batch=ghost_batch, dtype=dtype))
    compare(layer, sizes, kind, TOLERANCE[dtype])


@pytest.mark.parametrize(("samples", "ghost_batch", "sizes"), CHUNKS, ids=str)
@pytest.mark.parametrize("kind", ["3d", "4d", "5d"])
def test_a_mask_leaves_values_out_of_their_chunk(samples: int, ghost_batch: int, sizes: list[int], kind: str) -> None:
    layer = parameters(LAYERS[kind](CHANNELS, ghost_batch=ghost_batch, dtype=torch.float64))
    compare(layer, sizes, kind, 1e-10, masked=True)


@each_option({"momentum": None}, {"momentum": 1.0}, {"affine": False}, {"eps": 0.5})
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_every_option_holds_over_several_steps(options: dict, masked: bool) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=4, dtype=torch.float64, **options))
    compare(layer, [4, 6], "4d", 1e-10, masked=masked, count=3)


def test_a_mask_may_broadcast_over_samples() -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=4, dtype=torch.float64))
    expected = Ghosts(layer)
    x = make_steps([10], SPATIAL["4d"])[0].x[0]
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    assert_close(layer(x, mask), expected(x, [4, 6], mask), 1e-10, "y")
    assert_close(layer.running_var, expected.var, 1e-10, "running_var")


def test_a_chunk_that_keeps_nothing_does_not_pull_the_running_statistics() -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=4, dtype=torch.float64))
    expected = Ghosts(layer)
    x = make_steps([12], SPATIAL["4d"])[0].x[0]
    mask = torch.ones(12, 1, 1, dtype=torch.bool)
    mask[4:8] = False
    y = layer(x, mask)
    assert_close(y, expected(x, [4, 4, 4], mask), 1e-10, "y")
    assert not y[4:8].any()
    assert_close(layer.running_mean, expected.mean, 1e-10, "running_mean")
    assert_close(layer.running_var, expected.var, 1e-10, "running_var")
    assert layer.num_batches_tracked == 1


def test_the_biased_running_variance_is_the_mean_of_the_chunks_biased_ones() -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, momentum=1.0, ghost_batch=4, biased_running_var=True, dtype=torch.float64)
    x = make_steps([10], SPATIAL["4d"])[0].x[0]
    layer(x)
    variances = [chunk.transpose(0, 1).flatten(1).var(1, correction=0) for chunk in x.split([4, 6])]
    assert_close(layer.running_var, torch.stack(variances).mean(0), 1e-10, "running_var")


@pytest.mark.parametrize("masked", [False, True], ids=["empty", "masked"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_of_nothing_moves_nothing(momentum: float | None, masked: bool) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, momentum=momentum, ghost_batch=4))
    x = torch.randn(10 if masked else 0, CHANNELS, 4, 3, requires_grad=True)
    y = layer(x, torch.tensor(False) if masked else None)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(x))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))
    assert torch.equal(layer.running_var, torch.ones(CHANNELS))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("ghost_batch", [0, -1])
def test_a_ghost_batch_of_less_than_one_sample_is_refused(ghost_batch: int) -> None:
    with pytest.raises(ValueError, match=f"ghost_batch={ghost_batch}"):
        syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=ghost_batch)


@pytest.mark.parametrize("spatial", [(), (1, 1)], ids=str)
def test_one_value_per_channel_in_a_chunk_raises(spatial: tuple[int, ...]) -> None:
    layer = syncbn.SyncBatchNorm(CHANNELS, ghost_batch=1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.randn(2, CHANNELS, *spatial))
    assert torch.equal(layer.running_mean, torch.zeros(CHANNELS))
    assert layer.num_batches_tracked == 0


def test_a_ghost_batch_of_one_sample_normalizes_each_image_by_itself() -> None:
    compare(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=1, dtype=torch.float64), [1] * 5, "4d", 1e-10)


def test_eval_uses_the_running_statistics_of_the_whole() -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=4, dtype=torch.float64))
    local = nn.BatchNorm2d(CHANNELS, dtype=torch.float64).eval()
    x = make_steps([10], SPATIAL["4d"])[0].x[0]
    layer(x)
    local.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), local(x))


def a_step(
    rank: int, world_size: int, layer: nn.Module, pieces: list[Tensor], masked: bool
) -> tuple[Tensor, Tensor, Messages]:
    x = pieces[rank].requires_grad_()
    with messages() as sent, force_exchange():
        y = layer(x, torch.tensor(True) if masked else None)
        y.square().sum().backward()
    return y.detach(), layer.running_var, sent


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_is_sent_and_each_rank_is_by_itself(ranks: Ranks, world_size: int, masked: bool) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=4, dtype=torch.float64))
    pieces = make_steps([10, 8][:world_size], SPATIAL["4d"])[0].x
    for (y, var, sent), x in zip(ranks.run(a_step, layer, pieces, masked, world_size=world_size), pieces, strict=True):
        expected = Ghosts(layer)
        assert len(sent) == 0
        assert_close(y, expected(x, [4, len(x) - 4]), 1e-10, "y")
        assert_close(var, expected.var, 1e-10, "running_var")


def test_a_second_derivative_equals_that_of_the_chunks() -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=4, dtype=torch.float64))
    expected = Ghosts(layer)
    (step,) = make_steps([10], SPATIAL["4d"])
    second = []
    for forward in (layer, lambda x: expected(x, [4, 6])):
        x = step.x[0].clone().requires_grad_()
        (dx,) = torch.autograd.grad((forward(x).square() * step.dy[0]).sum(), x, create_graph=True)
        dx.square().sum().backward()
        second.append(x.grad)
    assert_close(*second, 1e-9, "second derivative")
    assert_close(layer.weight.grad, expected.twin.weight.grad, 1e-9, "weight")
