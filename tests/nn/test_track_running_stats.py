"""``track_running_stats = False`` set on a layer that has running statistics: torch's meaning, by every path."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.nn import simulation
from tests.nn.support.oracle import CHANNELS, close
from tests.nn.support.own_forward import Split
from tests.support.ranks import Ranks


class Own(nn.BatchNorm2d):
    """Calls the function as torch's layer does."""

    def forward(self, x: Tensor) -> Tensor:
        tracks = self.track_running_stats
        if self.training and tracks:
            self.num_batches_tracked.add_(1)
        mean, var = (self.running_mean, self.running_var) if tracks or not self.training else (None, None)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: syncbn.SyncBatchNorm2d(CHANNELS),
    "cumulative": lambda: syncbn.SyncBatchNorm2d(CHANNELS, momentum=None),
    "biased": lambda: syncbn.SyncBatchNorm2d(CHANNELS, biased_running_var=True),
    "ghost": lambda: syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=2),
    "alone": lambda: syncbn.SyncBatchNorm2d(CHANNELS, group=1),
    "own": lambda: syncbn.convert(Own(CHANNELS)),
    "simulated": lambda: simulation.simulate(nn.BatchNorm2d(CHANNELS), 2),
    "simulated, each": lambda: simulation.simulate(nn.BatchNorm2d(CHANNELS), 2, keep="each"),
    "without buffers": lambda: without_buffers(syncbn.SyncBatchNorm2d(CHANNELS)),
}


def without_buffers(layer: nn.Module) -> nn.Module:
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return layer


def a_batch(rank: int) -> Tensor:
    return torch.randn(4, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(rank)) + 3


def toggled(rank: int, world_size: int) -> dict[str, tuple]:
    """Outputs in training and in evaluation, and the buffers before and after."""
    results = {}
    for name, make in LAYERS.items():
        layer = make()
        layer(a_batch(rank + 7))  # so that buffers are not those of a new layer
        layer.track_running_stats = False
        before = deepcopy(list(layer.buffers()))
        outputs = [layer(a_batch(rank)), checkpoint(layer, a_batch(rank).requires_grad_(), use_reentrant=False)]
        outputs[1].sum().backward()
        if name not in ("own", "simulated", "simulated, each"):
            outputs.append(layer(a_batch(rank), torch.ones(4, 1, 1, dtype=torch.bool)))
        layer(a_batch(rank)[:0] if name in ("plain", "alone") else a_batch(rank))
        if isinstance(layer, simulation.Simulated):
            layer.pool()
        after = list(layer.buffers())
        results[name] = [y.detach() for y in outputs], before, after, layer.eval()(a_batch(rank))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_layer_that_was_told_to_stop_tracking_keeps_its_statistics(ranks: Ranks, world_size: int) -> None:
    whole = torch.cat([a_batch(rank) for rank in range(world_size)])
    for rank, results in enumerate(ranks.run(toggled, world_size=world_size)):
        for name, (outputs, before, after, in_eval) in results.items():
            for was, is_now in zip(before, after, strict=True):
                assert torch.equal(was, is_now), name
            local = name in ("alone", "ghost") or name.startswith("simulated")
            expected = F.batch_norm(whole, None, None, training=True)[4 * rank :][:4]
            if local:
                x, halves = a_batch(rank), 2 if name != "alone" else 1
                parts = [x[i::2] for i in range(2)] if name.startswith("simulated") else x.chunk(halves)
                done = [F.batch_norm(part, None, None, training=True) for part in parts]
                expected = torch.stack(done, 1).flatten(0, 1) if name.startswith("simulated") else torch.cat(done)
            for y in outputs:
                close(y, expected, 1e-5, name)
            if before:
                close(in_eval, F.batch_norm(a_batch(rank), before[0], before[1]), 1e-5, name)


def test_an_adapted_layer_uses_the_statistics_that_it_keeps() -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS)
    layer(a_batch(0))
    layer.track_running_stats = False
    before = deepcopy(list(layer.buffers()))
    with syncbn.adapt(layer.eval(), prior=4):
        y = layer(a_batch(1))
    var, mean = torch.var_mean(a_batch(1), (0, 2, 3), correction=0)
    close(y, F.batch_norm(a_batch(1), (before[0] + mean) / 2, (before[1] + var) / 2), 1e-5, "y")
    assert all(torch.equal(was, now) for was, now in zip(before, layer.buffers(), strict=True))


def splits(rank: int, world_size: int) -> Tensor:
    layer = syncbn.convert(Split(CHANNELS), only="")
    layer.aux.track_running_stats = False
    return layer(a_batch(rank))[2:]


def test_a_batch_norm_within_that_was_left_out_stays_so(ranks: Ranks) -> None:
    for rank, y in enumerate(ranks.run(splits, world_size=2)):
        close(y, F.batch_norm(a_batch(rank)[2:], None, None, training=True), 1e-5, "y")
