import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import syncbn
from syncbn.training import SyncBatchNormPlugin
from tests.support.ranks import Ranks, messages


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 4), syncbn.SyncBatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4))
    )


def test_revert_takes_back_what_apply_did_and_no_more() -> None:
    model, plugin = net(), SyncBatchNormPlugin()
    model[0].eval()
    kinds = [type(m) for m in model.modules()]
    assert plugin.apply(model) is model
    assert all(isinstance(m, syncbn.SyncBatchNorm1d) for m in (model[0], model[2], model[3][0]))
    assert not model[0].training
    assert plugin.revert(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert not model[0].training
    assert model[3][0].training


def test_only_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"matches no batch norm layer; the names are \['0', '2', '3.0'\]"):
        SyncBatchNormPlugin(only="conv*").apply(net())


def test_a_wrong_group_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match='group="nodes" is not known'):
        SyncBatchNormPlugin(group="nodes")


def test_lightnings_own_switch_beside_the_plugin_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="SyncBatchNormPlugin"):
        pl.Trainer(sync_batchnorm=True, plugins=[SyncBatchNormPlugin()], accelerator="cpu", devices=2, strategy="ddp")


def test_lightnings_own_switch_on_top_of_our_layers_is_refused() -> None:
    lightnings = pl.plugins.TorchSyncBatchNorm() if hasattr(pl.plugins, "TorchSyncBatchNorm") else None
    assert lightnings is not None
    with pytest.raises(TypeError, match=r"drop .*convert_sync_batchnorm .*sync_batchnorm=True"):
        lightnings.apply(syncbn.convert(net()))


def start(rank: int, world_size: int, group: object) -> tuple[int, bool, list[torch.Tensor]]:
    """Broadcasts in one forward pass, whether there is a trace of it after revert, and the buffers at the start."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4)))
    model[1].running_mean.fill_(rank + 1.0)  # as after loading a checkpoint on one rank alone
    model[1].num_batches_tracked.fill_(7 * (rank + 1))
    before = set(model.__dict__)
    plugin = SyncBatchNormPlugin(group=group)
    plugin.apply(model)
    buffers = [buffer.clone() for buffer in model.buffers()]
    wrapped = nn.parallel.DistributedDataParallel(model)
    with messages() as sent:
        wrapped(torch.randn(3, 4))
    plugin.revert(model)
    return sum("broadcast" in name for name in sent.operations), set(model.__dict__) == before, buffers


@pytest.mark.parametrize(("group", "broadcasts"), [("world", 0), (1, 1)])
def test_shared_statistics_are_made_equal_once_and_broadcast_no_more(
    ranks: Ranks, group: object, broadcasts: int
) -> None:
    results = ranks.run(start, group, world_size=2, fresh=True)
    for count, clean, buffers in results:
        assert (count > 0) == (broadcasts > 0)
        assert clean
        if group == "world":
            assert all(torch.equal(mine, rank_0s) for mine, rank_0s in zip(buffers, results[0][2], strict=True))
            assert buffers[2] == 7
