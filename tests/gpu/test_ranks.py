"""Several ranks on one GPU, each a process: over gloo, and over NCCL where that lets them."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.gpu.support.cuda_graphs import Replayed
from tests.gpu.support.steps import ROADS, Training, check, on_a_rank, prepare, road
from tests.nn.support.cases import Case
from tests.nn.support.oracle import close
from tests.nn.test_properties import Step
from tests.support.ranks import RankError, Ranks

STARTS = 180.0  # seconds until a rank has its CUDA context and its kernels

UNEVEN = Case((2, 6), ((4, 3), (4, 3)), (False, False), 5, x_layout="channels_last", shift=1.0)
CASES = {
    "even": replace(UNEVEN, samples=(4, 4), dtype=torch.bfloat16, steps=2),
    "uneven": replace(UNEVEN, samples=(2, 6), steps=3, momentum=None),
    "images of two sizes": replace(UNEVEN, spatial=((4, 3), (7, 5)), x_layout="contiguous", dy_layout="channels_last"),
    "an empty rank": replace(UNEVEN, samples=(0, 6), dtype=torch.float16, steps=2),
    "one value a rank": replace(UNEVEN, samples=(1, 1), spatial=((1, 1), (1, 1)), x_layout="contiguous"),
    "one value in all": replace(UNEVEN, samples=(0, 1), spatial=((1, 1), (1, 1))),
    "empty": replace(UNEVEN, samples=(0, 0), momentum=None),
    "masked": replace(UNEVEN, mask="values", steps=2),
    "an input that needs no gradient": replace(UNEVEN, frozen=(True, False), affine=False),
}


@pytest.mark.parametrize("added", ["", "residual, relu"])
@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("name", ROADS)
def test_two_ranks_over_gloo_equal_one_process(ranks: Ranks, device: str, name: str, what: str, added: str) -> None:
    training = prepare(CASES[what], added)
    results = ranks.run(on_a_rank, training, device, name, world_size=2, timeout=STARTS)
    check(training, results, device, name)


def with_nccl(rank: int, world_size: int, store: str) -> None:
    """Takes this rank into a group of NCCL's, as if on a host of its own: of one host, a GPU serves one rank only."""
    os.environ |= {"NCCL_HOSTID": f"host {rank}", "NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "WARN"}
    dist.destroy_process_group()
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=world_size)
    total = torch.ones(1, device="cuda", dtype=torch.float64)
    dist.all_reduce(total)
    assert total.item() == world_size


@pytest.fixture(scope="module")
def refusal(ranks: Ranks, device: str, tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """Why NCCL does not let two ranks share this GPU, or None where it does."""
    if device != "cuda":
        return "needs a GPU"
    try:
        ranks.run(with_nccl, str(tmp_path_factory.mktemp("nccl") / "store"), world_size=2, timeout=STARTS)
    except RankError as error:
        lines = [
            line.strip() for line in str(error).splitlines() if re.search("nccl|did not end|Duplicate", line, re.I)
        ]
        return f"NCCL does not let two ranks share a GPU: {' '.join(lines[-3:]) or error}"
    return None


def by_nccl(rank: int, world_size: int, store: str, training: Training, name: str) -> list[Step]:
    with_nccl(rank, world_size, store)
    return on_a_rank(rank, world_size, training, "cuda", name)


@pytest.mark.parametrize("what", CASES)
def test_two_ranks_over_nccl_equal_one_process(ranks: Ranks, refusal: str | None, what: str, tmp_path: Path) -> None:
    if refusal is not None:
        pytest.skip(refusal)
    training = prepare(CASES[what], "residual, relu")
    for name in ROADS:
        store = str(tmp_path / name)
        results = ranks.run(by_nccl, store, training, name, world_size=2, timeout=STARTS)
        check(training, results, "cuda", name)


def replayed(rank: int, world_size: int, store: str, samples: list[int]) -> list[dict[str, Tensor]]:
    """What replays of a graph give on this rank, and after them what eager passes do."""
    with_nccl(rank, world_size, store)
    results = []
    for captured in (True, False):
        results.append(Replayed((samples[rank], 19, 4, 3), captured=captured, seed=rank).run(count=3))
    return results


@pytest.mark.parametrize("samples", [[2, 6], [0, 6]], ids=str)
def test_a_graph_with_messages_equals_eager(
    ranks: Ranks, refusal: str | None, samples: list[int], tmp_path: Path
) -> None:
    if refusal is not None:
        pytest.skip(refusal)
    for graph, eager in ranks.run(replayed, str(tmp_path / "store"), samples, world_size=2, timeout=STARTS):
        assert graph.keys() == eager.keys()
        for name, value in eager.items():
            close(graph[name], value, 1e-6, name)


class Net(nn.Module):
    """A residual block between two convolutions, converted or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.again = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = syncbn.norm_act(self.norm, self.first(x))
        x = syncbn.norm_act(self.again, self.second(x), residual=x)
        return self.head(x.mean((2, 3)))


def a_net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def trained(net: nn.Module, model: nn.Module, x: Tensor, labels: Tensor, device: str) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, target in zip(x.to(device).unbind(), labels.to(device).unbind(), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()
    return {name: value.cpu() for name, value in net.state_dict().items()}


def with_ddp(rank: int, world_size: int, x: Tensor, labels: Tensor, device: str, name: str) -> dict[str, Tensor]:
    net = syncbn.convert(a_net()).to(device, memory_format=torch.channels_last)
    half = slice(rank * x.shape[1] // 2, (rank + 1) * x.shape[1] // 2)
    torch.backends.cudnn.allow_tf32 = False  # float32's short form has 19 bits
    with road(name, device):
        return trained(net, DistributedDataParallel(net, broadcast_buffers=False), x[:, half], labels[:, half], device)


@pytest.mark.parametrize("name", ROADS)
def test_a_training_with_ddp_follows_that_of_one_process(ranks: Ranks, device: str, name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 3, 4, 4, generator=generator)
    labels = torch.randint(4, (3, 8), generator=generator)
    net = a_net().double()
    expected = trained(net, net, x.double(), labels, "cpu")
    first, second = ranks.run(with_ddp, x, labels, device, name, world_size=2, timeout=STARTS)
    for key, value in expected.items():
        close(first[key], value, 1e-4, key)
        assert "running" not in key or torch.equal(first[key], second[key]), key
