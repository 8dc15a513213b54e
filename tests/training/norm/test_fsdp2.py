"""FSDP2 shards the weights; the layers share statistics, if they are converted before the network is sharded."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import syncbn
from tests.support.ranks import Ranks


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)]
    return nn.Sequential(*parts).double()


def trained(net: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in batches:
        net(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def batches() -> list[Tensor]:
    return list(torch.randn(3, 8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def documented() -> dict[str, Any]:
    """What the code in docs/guide/models.md defines."""
    page = (Path(__file__).parents[3] / "docs" / "guide" / "models.md").read_text(encoding="utf-8")
    # The ranks are there already, so the trainer is not made; its arguments are checked.
    lightning = SimpleNamespace(LightningModule=pl.LightningModule, Trainer=inspect.signature(pl.Trainer).bind)
    names = {"pl": lightning, "syncbn": syncbn, "fully_shard": fully_shard}
    names["ModelParallelStrategy"] = ModelParallelStrategy
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, names)
    return names


def sharded(rank: int, world_size: int) -> dict[str, Tensor]:
    module = documented()["Sharded"]()
    module.network = net = network()
    module._device_mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("data_parallel",))
    module.configure_model()
    trained(net, [whole.chunk(world_size)[rank] for whole in batches()])
    return {
        name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in net.state_dict().items()
    }


def test_sharded_ranks_train_as_one_process_with_the_whole_batch(ranks: Ranks) -> None:
    trained(alone := network(), batches())
    for state in ranks.run(sharded, world_size=2):
        torch.testing.assert_close(state, dict(alone.state_dict()), rtol=1e-9, atol=1e-9)


def test_lightnings_strategy_for_fsdp2_asks_no_plugin() -> None:
    """The reason why docs/guide/models.md converts in ``configure_model``; if it fails, the plugin may do it."""
    assert "_layer_sync.apply" in inspect.getsource(DDPStrategy.setup)
    assert "_layer_sync" not in inspect.getsource(ModelParallelStrategy.setup)
