"""Every precision with every norm, on two ranks: batch norm's parameters and statistics are never in half precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.nn.torch_internals import BatchNormBase
from syncbn.training.models.networks import ResNet
from syncbn.training.network.half_precision import HalfPrecisionButBatchNorm, plugins
from syncbn.training.norm import replace
from syncbn.training.norm.plugin import SyncBatchNormPlugin
from syncbn.training.norm.pooled_statistics import pool_running_statistics
from tests.support.ranks import Ranks
from tests.training.support.train_command import train

NORMS: dict[str, dict[str, Any]] = {
    "sync": {"name": "sync", "group": "world"},
    "local": {"name": "local"},
    "local_mean": {"name": "local_mean"},
    "ghost": {"name": "ghost", "ghost_batch": 4},
    "none": {"name": "none"},
    "group_norm": {"name": "group_norm", "num_groups": 4, "min_channels": 1},
}
PRECISIONS = {"bf16-mixed": torch.float32, "bf16-true": torch.float32, "64-true": torch.float64}


def precision_plugin(precision: str) -> Precision:
    if precision == "bf16-mixed":
        return MixedPrecision("bf16-mixed", "cpu")
    return HalfPrecisionButBatchNorm("bf16-true") if precision == "bf16-true" else DoublePrecision()


def trained(
    rank: int, world_size: int, norm: dict[str, Any], precision: str | None
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    net: nn.Module = ResNet(width=8)
    replace.prepare_model(net, norm)
    plugin = Precision() if precision is None else precision_plugin(precision)
    if norm["name"] in ("sync", "ghost"):
        SyncBatchNormPlugin(norm.get("group", 1), None, norm.get("ghost_batch")).apply(net)
    plugin.convert_module(net)
    ddp, losses = DistributedDataParallel(net), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for batch in torch.randn(4, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1)):
        with plugin.forward_context():
            loss = ddp(plugin.convert_input(batch.chunk(world_size)[rank])).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    if norm["name"] == "local_mean":
        pool_running_statistics(net)
    total = torch.stack(losses)
    dist.all_reduce(total)
    for layer in net.modules():
        if isinstance(layer, BatchNormBase):
            kinds = {each.dtype for each in (layer.running_mean, layer.running_var, layer.weight, layer.bias)}
            assert kinds == {PRECISIONS.get(precision or "", torch.float32)}
    return total / world_size, net.state_dict()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_two_ranks_train_in_every_precision(ranks: Ranks, norm: str, precision: str) -> None:
    (losses, state), (_, other) = ranks.run(trained, NORMS[norm], precision, world_size=2)
    exact, _ = ranks.run(trained, NORMS[norm], None, world_size=2)[0]
    torch.testing.assert_close(losses, exact, rtol=1e-4 if precision == "64-true" else 0.05, atol=0.02)
    same = [name for name in state if norm in ("sync", "local_mean") or not name.endswith(("_mean", "_var"))]
    assert [name for name in same if not torch.equal(state[name], other[name])] == []
    weights = {each.dtype for name, each in state.items() if "conv" in name}
    assert weights == {{"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)}


def test_lightnings_own_half_precision_rounds_the_statistics() -> None:
    """The reason for this plugin; if it fails, Lightning has begun to leave batch norm as it is."""
    from lightning.pytorch.plugins import HalfPrecision

    layer = nn.BatchNorm2d(2)
    assert HalfPrecision("bf16-true").convert_module(layer).running_var.dtype == torch.bfloat16


def test_the_plugin_takes_the_precision_from_the_arguments() -> None:
    settings = {"precision": "bf16-true", "max_epochs": 1}
    assert [each.precision for each in plugins(settings)] == ["bf16-true"]
    assert settings == {"max_epochs": 1}
    assert plugins({"precision": "bf16-mixed"}) == []


def test_a_run_in_bfloat16_keeps_statistics_in_float32(tmp_path: Path) -> None:
    run = train(tmp_path, "trainer.precision=bf16-true", "trainer.max_epochs=2", "logger=csv").ended()
    assert run.directory is not None
    state = torch.load(run.directory / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert state["network.stem.0.weight"].dtype == torch.bfloat16
    assert state["network.stem.1.running_var"].dtype == torch.float32
    assert run.json("result")["test"]["test/acc"] > 0.5
