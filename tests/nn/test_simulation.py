"""One process that simulates devices, against processes: the layer, and training."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import syncbn
from syncbn.nn import simulation
from syncbn.nn.conversion import ddp_buffers
from syncbn.training.norm.pooled_statistics import pool_running_statistics
from tests.support.ranks import Ranks

State = dict[str, torch.Tensor]
STEPS, CHANNELS = 6, 3
MODES = ["sync", "group=2", "local", "local_mean", "ghost=2"]


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    if kind == "mlp":
        layers: list[nn.Module] = [nn.Linear(5, CHANNELS, bias=False), nn.BatchNorm1d(CHANNELS), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(CHANNELS, 4, bias=False), nn.BatchNorm1d(4, momentum=None)).double()
    layers = [nn.Conv2d(2, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, 4, 2)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4, affine=False), nn.Flatten()).double()


def batches(kind: str, samples: int) -> torch.Tensor:
    shape = (5,) if kind == "mlp" else (2, 5, 4)
    return torch.randn(STEPS, samples, *shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 0.5


def train(model: nn.Module, inputs: torch.Tensor, accumulate: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    for number, x in enumerate(inputs, 1):
        (model(x).pow(3).sum(1).mean() / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


def as_ranks(
    rank: int, world_size: int, kind: str, mode: str, accumulate: int, inputs: torch.Tensor
) -> dict[str, torch.Tensor]:
    model = network(kind)
    if mode == "sync":
        syncbn.convert(model)
    elif mode == "group=2":
        syncbn.convert(model, group=2)
    elif mode == "ghost=2":
        syncbn.convert(model, ghost_batch=2)
    if mode == "local_mean":
        ddp = DistributedDataParallel(model, forward_sync_buffers=False)
    else:
        ddp = DistributedDataParallel(ddp_buffers.broadcast_buffers_once(model))
    train(ddp, inputs[:, rank::world_size], accumulate)
    if mode == "local_mean":
        pool_running_statistics(model)
    else:  # as a forward pass of evaluation has it
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return model.state_dict()


def as_one(kind: str, mode: str, accumulate: int, inputs: torch.Tensor, devices: int) -> State:
    model = network(kind)
    sharing = {"sync": devices, "group=2": 2}.get(mode, 1)
    keep = "each" if mode == "local_mean" else "first"
    ghost = 2 if mode == "ghost=2" else None
    simulation.simulate(model, devices, sharing=sharing, ghost_batch=ghost, accumulate=accumulate, keep=keep)
    train(model, inputs.reshape(STEPS // accumulate, -1, *inputs.shape[2:]), 1)
    for layer in model:
        if isinstance(layer, simulation.Simulated):
            layer.pool()
    return model.state_dict()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "world_size", "accumulate"), [("mlp", 2, 3), ("image", 2, 1), ("mlp", 4, 1)])
def test_one_process_learns_what_ranks_do(ranks: Ranks, kind: str, world_size: int, accumulate: int, mode: str) -> None:
    inputs = batches(kind, 8 * world_size)
    expected = ranks.run(as_ranks, kind, mode, accumulate, inputs, world_size=world_size)
    found = as_one(kind, mode, accumulate, inputs, world_size)
    assert found.keys() == expected[0].keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[0][name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_modes_differ() -> None:
    """Or the test above would pass with any of them in the place of another."""
    inputs = batches("mlp", 16)
    results = {mode: as_one("mlp", mode, 1, inputs, 4) for mode in MODES}
    for key in ("0.weight", "1.running_var"):
        values = [each[key] for mode, each in results.items() if (key, mode) != ("0.weight", "local_mean")]
        for index, value in enumerate(values):
            assert all((value - other).abs().max() > 1e-4 for other in values[:index])


def test_some_layers_alone() -> None:
    model = network("mlp")
    simulation.simulate(model, 4, sharing=4, only="1")
    simulation.simulate(model, 4)
    assert (model[1].sharing, model[4].sharing) == (4, 1)


def test_it_is_taken_back() -> None:
    model = network("mlp")
    before: dict[str, Any] = {name: dict(vars(layer)) for name, layer in model.named_modules()}
    simulation.unsimulate(simulation.simulate(model, 2, keep="each"))
    assert type(model[1]) is nn.BatchNorm1d
    assert {name: dict(vars(layer)) for name, layer in model.named_modules()} == before


def test_evaluation_is_torchs() -> None:
    model = network("mlp").eval()
    x = batches("mlp", 3)[0]
    expected = model(x)
    assert torch.equal(simulation.simulate(model, 2)(x), expected)


class OneDevice(TorchDispatchMode):
    """Refuses tensors of two devices in one operation, as a GPU does; the meta device lets some pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        places = {each.device.type for each in given if each.dim() or each.device.type != "cpu"}  # numbers go anywhere
        assert len(places) < 2 or func is torch.ops.aten._to_copy.default, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_all_that_is_made_is_on_the_layers_device(mode: str, momentum: float | None) -> None:
    layer = nn.BatchNorm2d(CHANNELS, momentum=momentum, device="meta")
    options = {"sync": {"sharing": 4}, "group=2": {"sharing": 2}, "ghost=2": {"ghost_batch": 2}}.get(mode, {})
    keep = "each" if mode == "local_mean" else "first"
    simulation.simulate(layer, 4, **options, accumulate=2, keep=keep)
    with OneDevice():
        layer(torch.randn(32, CHANNELS, 5, 4, device="meta", requires_grad=True)).sum().backward()
        layer.pool()
    assert layer.running_var.device.type == layer.weight.grad.device.type == "meta"


@pytest.mark.parametrize("keep", ["first", "each"])
def test_half_precision_is_of_the_data_alone(keep: str) -> None:
    """Inputs are rounded before, so that sums of so few of them are exact in float32, and in bfloat16 are not."""
    x = (batches("image", 64)[0] + 20).bfloat16()
    layers = {}
    for dtype in (torch.bfloat16, torch.float64):
        layers[dtype] = simulation.simulate(
            nn.BatchNorm2d(2, dtype=torch.promote_types(dtype, torch.float32)), 2, keep=keep
        )
        assert layers[dtype](x.to(dtype)).dtype == dtype
        layers[dtype].pool()
    torch.testing.assert_close(
        layers[torch.bfloat16].running_var, layers[torch.float64].running_var.float(), rtol=1e-5, atol=0
    )
    plain = nn.BatchNorm2d(2, affine=False, track_running_stats=False)
    expected = plain(x[::2].float())
    torch.testing.assert_close(simulation.simulate(plain, 2)(x)[::2].float(), expected, rtol=8e-3, atol=1e-2)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_at_its_ends(momentum: float) -> None:
    layer = simulation.simulate(nn.BatchNorm1d(5, momentum=momentum).double(), 2, accumulate=2)
    x = batches("mlp", 16)[0]
    layer(x)
    expected = torch.zeros(5).double() if momentum == 0 else x[8::2].mean(0)  # the last batch of the first device
    torch.testing.assert_close(layer.running_mean, expected)


@pytest.mark.parametrize(
    ("arguments", "samples", "message"),
    [
        ({"devices": 2}, 5, "5 samples cannot be cut into batches of 2 on each of 2 devices"),
        ({"devices": 2, "ghost_batch": 3}, 8, "8 samples cannot be cut into batches of 3 on each of 2 devices"),
        ({"devices": 4}, 4, "more than 1 value per channel"),
    ],
)
def test_samples_that_do_not_divide(arguments: dict[str, Any], samples: int, message: str) -> None:
    model = simulation.simulate(network("mlp"), **arguments)
    with pytest.raises(ValueError, match=message):
        model(batches("mlp", samples)[0])


def test_what_cannot_be_simulated() -> None:
    with pytest.raises(ValueError, match="devices=4 sharing=3"):
        simulation.simulate(network("mlp"), 4, sharing=3)
    with pytest.raises(TypeError, match=r"0 is a SyncBatchNorm1d: simulated are torch's own alone"):
        simulation.simulate(nn.Sequential(syncbn.SyncBatchNorm1d(2)), 2)
