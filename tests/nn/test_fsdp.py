"""Parameters sharded over the ranks by ``torch.distributed.fsdp.fully_shard``: the run is that of one process."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import syncbn
from tests.nn.support.oracle import CHANNELS, close
from tests.support.ranks import Ranks

STEPS, PER_RANK = 5, 3
BATCH = 2 * PER_RANK
Record = tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(CHANNELS, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
        nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4, momentum=None)),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def data(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, BATCH, CHANNELS, 4, 4, generator=generator, dtype=torch.float64)
    x += torch.arange(BATCH).view(-1, 1, 1, 1)  # ranks differ
    return list(zip(x.to(dtype), torch.randint(3, (STEPS, BATCH), generator=generator), strict=True))


def train(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for x, target in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x).to(x.dtype), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def sharded(rank: int, world_size: int, net: nn.Module, dtype: torch.dtype, blocks: bool, half: bool) -> Record:
    options = {"mesh": init_device_mesh("cpu", (world_size,))}
    if half:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in net[:2] if blocks else []:
        fully_shard(block, **options)
    fully_shard(net, **options)
    norm = net[0][1]
    assert isinstance(norm.weight, DTensor)
    seen = []
    norm.register_forward_hook(lambda layer, x, y: seen.append((type(layer.weight), layer.weight.dtype, y.dtype)))
    mine = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    losses = train(net, [(x[mine], target[mine]) for x, target in data(dtype)])
    compute = torch.bfloat16 if half else dtype
    assert seen == [(nn.Parameter, compute, compute)] * STEPS  # unsharded, when the layer runs
    assert not isinstance(norm.running_mean, DTensor)  # buffers are left alone, in their own type
    assert norm.running_mean.dtype == dtype
    return losses, whole(gradients(net)), whole(net.state_dict())


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "root"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_sharded_training_follows_one_process(ranks: Ranks, dtype: torch.dtype, tolerance: float, blocks: bool) -> None:
    one = a_net().double()
    losses = train(one, data(torch.float64))
    results = ranks.run(sharded, syncbn.convert(a_net()).to(dtype), dtype, blocks, False, world_size=2)
    for step, loss in enumerate(losses):
        close(sum(mine[step] for mine, *_ in results) / 2, loss, tolerance, f"loss {step}")
    for _, gradient, state in results:
        for name, expected in gradients(one).items():
            close(gradient[name], expected, tolerance, f"gradient of {name}")
        for name, expected in one.state_dict().items():
            close(state[name], expected, tolerance, name)
            assert torch.equal(state[name], results[0][2][name]), name


def test_mixed_precision_keeps_the_statistics_in_float32(ranks: Ranks) -> None:
    one = a_net()
    train(one, data(torch.float32))
    results = ranks.run(sharded, syncbn.convert(a_net()), torch.float32, True, True, world_size=2)
    for _, _, state in results:
        for name, expected in one.state_dict().items():
            close(state[name], expected, 1e-1, name)  # five steps of bfloat16
            assert torch.equal(state[name], results[0][2][name]), name


def local(rank: int, world_size: int, net: nn.Module) -> Tensor:
    return sharded(rank, world_size, net, torch.float64, True, False)[2]["0.1.running_mean"]


def test_without_the_exchange_the_run_is_another(ranks: Ranks) -> None:
    # So the tests above can fail: the same run with a group of one.
    one = a_net().double()
    train(one, data(torch.float64))
    for mean in ranks.run(local, syncbn.convert(deepcopy(a_net()), group=1).double(), world_size=2):
        assert (mean - one[0][1].running_mean).abs().max() > 1e-2
