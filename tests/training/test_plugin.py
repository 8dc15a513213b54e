import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import syncbn
from syncbn.training import SyncBatchNormPlugin


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
    assert torch.nn.SyncBatchNorm  # torch's own is untouched
