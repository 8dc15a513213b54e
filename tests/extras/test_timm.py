"""What timm does to models besides building them, before ``convert``, after it, and after ``revert``."""

from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import (
    ConvNormAct,
    SplitBatchNorm2d,
    convert_splitbn_model,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)
from timm.models import create_feature_extractor
from timm.utils import reparameterize_model
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn.nn.modules import Synchronized
from syncbn.testing import force_exchange
from tests.extras.support import zoo
from tests.extras.test_lossless import there_and_back
from tests.extras.test_training import assert_equal, step
from tests.support.model_snapshot import snapshot
from tests.support.ranks import Ranks

PLAIN, WITH_ACTIVATION = zoo.TIMM["resnet"], zoo.TIMM["efficientnet"]
BOTH = pytest.mark.parametrize("entry", [PLAIN, WITH_ACTIVATION], ids=str)
FLOAT64 = torch.float64


@BOTH
def test_split_batch_norm_there_and_back(entry: zoo.Entry) -> None:
    model, x = convert_splitbn_model(zoo.build(entry)).eval(), zoo.batch(entry, 2)
    expected = model(x)
    there_and_back(model, check=lambda: torch.equal(model(x), expected))


def split_step(rank: int, world_size: int, entry: zoo.Entry) -> None:
    with force_exchange():
        x = zoo.batch(entry, 8, FLOAT64)
        one, other = (convert_splitbn_model(zoo.build(entry)).double().train() for _ in range(2))
        expected = step(one, x)
        assert_equal(step(syncbn.convert(other), x), expected)
        assert any(isinstance(layer, SplitBatchNorm2d) for layer in other.modules())


@BOTH
def test_a_step_with_split_batch_norm(ranks: Ranks, entry: zoo.Entry) -> None:
    ranks.run(split_step, entry, world_size=1)


def test_timms_conversion_to_torchs_layers_is_refused_by_name_and_the_model_untouched() -> None:
    model = convert_sync_batchnorm(zoo.build(WITH_ACTIVATION))
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"bn1 is a SyncBatchNormAct: .*convert the model before"):
        syncbn.convert(model)
    assert snapshot(model) == before


@BOTH
def test_timms_conversion_on_top_of_ours_raises_and_says_what_to_drop(entry: zoo.Entry) -> None:
    with pytest.raises(TypeError, match="is synchronized already: drop"):
        convert_sync_batchnorm(syncbn.convert(zoo.build(entry)))


@BOTH
def test_a_checkpoint_of_a_model_with_torchs_layers_loads_both_ways(entry: zoo.Entry) -> None:
    trained = convert_sync_batchnorm(zoo.build(entry))
    ours = syncbn.convert(timm.create_model(entry.name, **entry.options))
    ours.load_state_dict(trained.state_dict())
    assert torch.equal(ours.eval()(zoo.batch(entry, 2)), trained.eval()(zoo.batch(entry, 2)))
    trained.load_state_dict(ours.state_dict())


@BOTH
def test_a_backbone_for_features_there_and_back(entry: zoo.Entry) -> None:
    model = timm.create_model(entry.name, features_only=True, **entry.options).eval()
    x = zoo.batch(entry, 2)
    expected = model(x)
    there_and_back(model, check=lambda: all(map(torch.equal, model(x), expected)))


@BOTH
def test_timm_freezes_our_layers_as_it_does_torchs(entry: zoo.Entry) -> None:
    model, x = zoo.build(entry), zoo.batch(entry, 2)
    frozen = [freeze_batch_norm_2d(each) for each in (deepcopy(model), syncbn.convert(model))]
    assert not any(isinstance(layer, _BatchNorm) for each in frozen for layer in each.modules())
    assert torch.equal(*(each(x) for each in frozen))
    before = snapshot(frozen[0])
    assert snapshot(syncbn.convert(frozen[0])) == before  # no batch norm any more


@pytest.mark.parametrize("family", ["fastvit", "repvit", "byobnet", "repghost", "levit"])
def test_reparametrization_merges_our_layers_as_it_does_torchs(family: str) -> None:
    entry = zoo.TIMM[family]
    model, x = zoo.build(entry), zoo.batch(entry, 2)
    merged = [reparameterize_model(each) for each in (model, syncbn.convert(deepcopy(model)))]
    assert torch.equal(*(each.eval()(x) for each in merged))


def test_a_model_traced_by_fx_there_and_back() -> None:
    model, x = zoo.build(WITH_ACTIVATION), zoo.batch(WITH_ACTIVATION, 2)
    traced = create_feature_extractor(model, ["blocks.1"]).eval()
    expected = traced(x)["blocks.1"]
    there_and_back(traced, check=lambda: torch.equal(traced(x)["blocks.1"], expected))
    extractor = create_feature_extractor(syncbn.revert(syncbn.convert(model)), ["blocks.1"]).eval()
    assert torch.equal(extractor(x)["blocks.1"], expected)


def compiled(rank: int, world_size: int) -> None:
    x = torch.randn(4, 3, 8, 8, dtype=FLOAT64)
    with force_exchange():
        eager = syncbn.convert(ConvNormAct(3, 4, 3).double())
        other = deepcopy(eager)
        assert isinstance(eager.bn, Synchronized)
        expected = step(eager, x)
        other.compile(fullgraph=True, backend="aot_eager")
        assert_equal(step(other, x), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_timms_layers_compile_in_one_graph(ranks: Ranks) -> None:
    ranks.run(compiled, world_size=1)
