"""The leak of batch statistics: known by hand, zero by construction, and what stays unchanged."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn.nn.simulation import simulate
from syncbn.training import measure_leak
from syncbn.training.evaluation.measure_leak import spread_over_devices
from syncbn.training.norm.replace import replace_by_group_norm
from tests.support.ranks import Ranks

DEVICES = 4
FEATURES = 6


class DeviceMean(nn.Module):
    """Outputs for each sample the mean of the samples that share its statistics, and nothing of the sample itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES, eps=1e12, affine=False)  # subtracts the mean, and divides by 1e6

    def forward(self, x: Tensor) -> Tensor:
        return x - self.norm(x) * 1e6


def net(devices: int = DEVICES) -> nn.Sequential:
    """A small network with layers that a measurement could change, simulating devices that each keep statistics."""
    torch.manual_seed(0)
    layers = nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 5)
    model = nn.Sequential(*layers, nn.BatchNorm1d(5, affine=False)).double()
    return simulate(model, devices, keep="each") if devices > 1 else model


def batches(images: int, number: int = 3, noise: float = 0.3) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)

    def normal() -> Tensor:
        return torch.randn(images, FEATURES, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(number):
        image = normal()
        found.append((image + noise * normal(), image + noise * normal(), torch.zeros(images)))
    return found


def test_an_encoder_that_shows_only_the_device_finds_every_partner_there_and_none_elsewhere() -> None:
    """One image per device: both views have the mean of this device, or each the mean of another one."""
    leak = measure_leak(simulate(DeviceMean().double(), DEVICES), batches(DEVICES))
    assert (leak.together, leak.spread, leak.difference) == (1.0, 0.0, 1.0)


def test_it_shows_nothing_where_all_devices_share_statistics() -> None:
    shared = simulate(DeviceMean().double(), DEVICES, sharing=DEVICES)
    views: list[Tensor] = []
    measure_leak(shared, batches(8), found=lambda one, two: _kept(views, one, two))
    for together, spread in zip(views[::2], views[1::2], strict=True):
        torch.testing.assert_close(together, spread, rtol=0, atol=1e-6)  # it multiplies rounding by 1e6


def _kept(views: list[Tensor], one: Tensor, two: Tensor) -> Tensor:
    views.append(torch.cat([one, two]))
    return torch.ones(len(one), dtype=torch.bool)


@pytest.mark.parametrize("norm", ["sync", "group_norm"])
def test_embeddings_are_the_same_in_both_arrangements_by_construction(norm: str) -> None:
    model = net(1)
    if norm == "sync":
        simulate(model, DEVICES, sharing=DEVICES)
    else:
        replace_by_group_norm(model, 2, 2)
    views: list[Tensor] = []
    leak = measure_leak(model, batches(16), found=lambda one, two: _kept(views, one, two))
    assert len(views) == 6
    for together, spread in zip(views[::2], views[1::2], strict=True):
        torch.testing.assert_close(together, spread, rtol=0, atol=1e-12)
    assert leak.difference == 0
    assert measure_leak(model, batches(16)).difference == 0


def test_two_networks_that_see_one_view_each_leak_too() -> None:
    """As MoCo. The set of samples on a device has to change, not the device alone."""
    query, key = (simulate(DeviceMean().double(), DEVICES) for _ in range(2))
    both = nn.ModuleList([query, key])
    data = [(image, image.clone()) for image, *_ in batches(2 * DEVICES)]
    leak = measure_leak(both, data, embed=lambda one, two: (query(one), key(two)), found=_same_mean)
    assert (leak.together, leak.spread) == (1.0, 0.0)


def _same_mean(one: Tensor, two: Tensor) -> Tensor:
    return torch.isclose(one, two, rtol=0, atol=1e-4).all(1)


def state(model: nn.Module) -> dict[str, Tensor]:
    rows = {f"{name}.rows": torch.cat(m.rows) for name, m in model.named_modules() if getattr(m, "rows", None)}
    return {name: value.clone() for name, value in (model.state_dict() | rows).items()}


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training: bool) -> None:
    model = net().train(training)
    model[5].eval()
    before, flags = state(model), [each.training for each in model.modules()]
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    measure_leak(model, batches(8))
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [each.training for each in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == draws[1:]  # type: ignore[index]
    assert all(p.grad is None for p in model.parameters())


def test_it_is_as_before_after_an_error_too() -> None:
    model = net()
    before = state(model)

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield from (each[:2] for each in batches(8, number=1))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        measure_leak(model, broken())
    assert all(torch.equal(value, state(model)[name]) for name, value in before.items())
    assert all(each.training for each in model.modules())


def test_a_frozen_layer_uses_its_running_statistics() -> None:
    model = net()
    for layer in (model[1], model[5]):
        layer.eval()
    assert measure_leak(model, batches(8)).difference == 0  # no layer takes statistics of the batch
    model.eval()  # of a model in evaluation mode all layers are measured
    assert measure_leak(model, batches(8)).difference != 0


def leak_of_rank(rank: int, world_size: int, sync: bool) -> tuple[float, float]:
    model = net(1)
    if sync:
        syncbn.convert(model)
    mine = [tuple(part[rank::world_size] for part in batch) for batch in batches(4 * world_size, 10, noise=1.0)]
    return tuple(measure_leak(model, mine))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_measure_what_one_process_that_simulates_them_does(ranks: Ranks, world_size: int) -> None:
    expected = measure_leak(net(world_size), batches(4 * world_size, 10, noise=1.0))
    assert expected.difference != 0
    assert ranks.run(leak_of_rank, False, world_size=world_size) == [tuple(expected)] * world_size
    (together, spread), *_ = ranks.run(leak_of_rank, True, world_size=world_size)
    assert together == spread


@pytest.mark.parametrize(("samples", "devices"), [(8, 2), (12, 3), (64, 16), (40, 4), (5, 1)])
def test_every_sample_goes_to_another_device_and_neighbours_part(samples: int, devices: int) -> None:
    permutation = spread_over_devices(samples, devices)
    assert sorted(permutation.tolist()) == list(range(samples))
    if devices == 1:
        return
    came_from = permutation.view(-1, devices) % devices
    assert not (came_from == torch.arange(devices)).any()
    for each in came_from.T.split(1):  # up to devices - 1 samples of a device come from different ones
        first = each[0][: devices - 1].tolist()
        assert len(set(first)) == len(first)


def test_too_few_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="num_batches=0: use a whole number"):
        measure_leak(net(), batches(8), 0)
    with pytest.raises(ValueError, match="at least one batch"):
        measure_leak(net(), [])
