from pathlib import Path

import pytest
import torch
from torch import nn

from syncbn.training.models.networks import MLP, ResNet
from syncbn.training.norm.pooled_statistics import pool_running_statistics
from syncbn.training.norm.replace import remove_batch_norm, replace_by_group_norm
from syncbn.training.norm.trainer_parts import parts
from tests.support.ranks import Ranks
from tests.training.support.train_command import train

BATCH_NORM = nn.modules.batchnorm._BatchNorm


@pytest.mark.parametrize("network", [ResNet(), MLP()])
def test_none_takes_the_norm_out_and_puts_the_biases_back(network: nn.Module) -> None:
    norms = sum(isinstance(m, BATCH_NORM) for m in network.modules())
    remove_batch_norm(network)
    assert not any(isinstance(m, BATCH_NORM) for m in network.modules())
    assert sum(isinstance(m, nn.Identity) for m in network.modules()) == norms
    before = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert all(m.bias is not None and m.bias.requires_grad and not m.bias.any() for m in before)
    assert len({id(m.bias) for m in before}) == len(before)
    assert network(torch.randn(4, 1, 8, 8)).shape == (4, 10)


def test_none_gives_no_bias_to_a_layer_that_does_not_feed_the_norm() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))
    remove_batch_norm(net)
    assert net[0].bias is None
    assert net[1].bias is not None


def test_group_norm_keeps_weight_bias_and_eps() -> None:
    net = nn.Sequential(nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24, eps=1e-3), nn.BatchNorm2d(24, affine=False))
    nn.init.normal_(net[1].weight)
    weight = net[1].weight
    replace_by_group_norm(net, 32, min_channels=3)
    assert net[1].weight is weight
    assert (net[1].num_groups, net[1].eps, net[1].affine) == (8, 1e-3, True)
    assert net[2].weight is None
    x = torch.randn(2, 24, 5, 5)
    expected = nn.functional.group_norm(x, 8, weight, net[1].bias, 1e-3)
    torch.testing.assert_close(net[1](x), expected)


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (16, 1), (64, 4), (48, 3), (512, 32), (1024, 32), (1030, 10)])
def test_a_group_has_enough_channels_for_statistics(channels: int, groups: int) -> None:
    net = nn.Sequential(nn.BatchNorm1d(channels))
    replace_by_group_norm(net)
    assert net[0].num_groups == groups


def test_a_shared_layer_stays_shared() -> None:
    shared = nn.BatchNorm1d(4)
    net = nn.Sequential(shared, nn.Linear(4, 4), shared)
    replace_by_group_norm(net, 2)
    assert net[0] is net[2]


def test_torch_sync_is_torchs_own_layer() -> None:
    """Converted and back; it runs on GPUs alone."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    statistics = net[1].running_mean
    (plugin,) = parts({"name": "torch_sync"}).plugins
    net = plugin.apply(net)
    assert type(net[1]) is nn.SyncBatchNorm
    net = plugin.revert(net)
    assert not isinstance(net[1], nn.SyncBatchNorm)
    assert net[1].running_mean is statistics


def test_ghost_trains_with_parts_of_a_devices_batch(tmp_path: Path) -> None:
    quick = ["model=mlp", "logger=csv", "trainer.max_epochs=1", "trainer.devices=1", "precise_batches=3"]
    quick += ["+trainer.limit_train_batches=6"]
    ghost = train(tmp_path, *quick, "norm=ghost", "norm.batch_size=8", "run.id=ghost")
    assert ghost.code == 0, ghost.err
    assert "32 samples each; norm ghost in ghost batches: statistics of 8 samples" in ghost.out
    assert ghost.json("run")["normalization_batch"] == 8
    sync = train(tmp_path, *quick, "norm=sync", "norm.batch_size=8", "run.id=sync")
    local = train(tmp_path, *quick, "norm=local", "run.id=local")
    for what in ("test", "precise"):
        assert ghost.json("result")[what] == sync.json("result")[what] != local.json("result")[what]


def pool(rank: int, world_size: int, means: list[float], variances: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    net = nn.Sequential(
        nn.BatchNorm1d(2), nn.Linear(2, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    )
    for layer in (net[0], net[2]):
        layer.running_mean.fill_(means[rank])
        layer.running_var.fill_(variances[rank])
    frozen = nn.BatchNorm1d(2)
    frozen.track_running_stats = False
    frozen.running_mean.fill_(rank)
    net.append(frozen)
    for _ in range(2):  # the second time everything is equal already, and nothing moves
        pool_running_statistics(net)
    assert frozen.running_mean.tolist() == [rank, rank]
    return torch.cat([net[0].running_mean, net[2].running_mean]), torch.cat([net[0].running_var, net[2].running_var])


def test_pooled_statistics_have_the_variance_of_the_means(ranks: Ranks) -> None:
    means, variances = [1.0, 4.0, -2.0], [1.0, 2.0, 6.0]
    expected_mean = torch.full((5,), sum(means) / 3)
    spread = torch.tensor(means).var(correction=0).item()
    assert spread > 1
    for mean, var in ranks.run(pool, means, variances, world_size=3):
        torch.testing.assert_close(mean, expected_mean)
        torch.testing.assert_close(var, torch.full((5,), sum(variances) / 3 + spread))
