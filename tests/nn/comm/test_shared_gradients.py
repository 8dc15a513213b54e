"""Gradients through shared memory: exact, the same on every rank, and never in the way of a layer's messages."""

import gc
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.nn.comm import channels, shared_gradients
from tests.support.compiled import needs_shared_memory
from tests.support.ranks import RankError, Ranks, messages

pytestmark = needs_shared_memory
PIECE = 64  # bytes, so that a bucket takes several turns


def wrapped(module: nn.Module, **options: Any) -> DistributedDataParallel:
    model = DistributedDataParallel(module, **options)
    with mock.patch.object(shared_gradients, "PIECE", PIECE):
        assert shared_gradients.register(model)
    return model


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 1), nn.Linear(1, 3)).to(dtype)


def gradients(rank: int, world_size: int, dtype: torch.dtype) -> tuple[list[Tensor], list[str], int]:
    with mock.patch.object(shared_gradients, "PIECE", PIECE):  # in the thread too
        model = wrapped(network(dtype), bucket_cap_mb=1e-4)
        with messages() as sent:
            for step in range(3):
                model.zero_grad()
                x = torch.randn(5, 7, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
                model(x).square().sum().backward()
    return [p.grad for p in model.parameters()], sent.operations, sent.averaged


def in_one_process(world_size: int) -> list[Tensor]:
    model = network(torch.float64)
    for rank in range(world_size):
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(20 + rank)).double()
        (model(x).square().sum() / world_size).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_they_are_the_mean_bitwise_the_same_on_each_rank(ranks: Ranks, world_size: int, dtype: torch.dtype) -> None:
    first, *others = ranks.run(gradients, dtype, world_size=world_size)
    expected = in_one_process(world_size)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, right in zip(first[0], expected, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=tolerance, atol=tolerance)
    for other in others:
        assert all(map(torch.equal, first[0], other[0]))
    assert not any("allreduce" in operation for operation in first[1])
    assert first[2] >= 6, "several buckets a step"


def test_half_precision_goes_through_gloo(ranks: Ranks) -> None:
    (_, operations, shared), _ = ranks.run(gradients, torch.bfloat16, world_size=2)
    assert operations.count("allreduce") >= 3
    assert shared == 0


class Apart(nn.Module):
    """Ranks use different parameters, so their buckets are ready at different places of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), syncbn.SyncBatchNorm1d(4), nn.Linear(4, 4)) for _ in range(3)
        )
        self.only = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for way in self.ways:
            x = way(x)
        return self.only[dist.get_rank()](x)


def apart(rank: int, world_size: int) -> list[Tensor]:
    torch.manual_seed(0)
    model = wrapped(Apart(), find_unused_parameters=True, bucket_cap_mb=1e-5)
    for step in range(20):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))
        time.sleep(0.002 * (rank + step) % 0.005)
        model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def test_a_bucket_is_not_waited_for_where_another_rank_waits_in_a_layer(ranks: Ranks) -> None:
    first, second = ranks.run(apart, world_size=2, timeout=30)
    assert all(map(torch.equal, first, second))


def accumulating(rank: int, world_size: int) -> list[Tensor]:
    model = wrapped(network())
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(rank))
    with model.no_sync():
        model(x[0]).sum().backward()
    model(x[1]).sum().backward()
    return [p.grad for p in model.parameters()]


def test_gradients_that_were_accumulated_are_averaged_once(ranks: Ranks) -> None:
    first, second = ranks.run(accumulating, world_size=2)
    assert all(map(torch.equal, first, second))


def killed(rank: int, world_size: int) -> str:
    dist.destroy_process_group()
    store = dist.FileStore(os.environ["TRY_STORE"], world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=20))
    model = wrapped(network())
    for _ in range(2):  # in the second one DistributedDataParallel arranges its buckets, through gloo
        model(torch.ones(5, 7)).sum().backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(5, 7)).sum().backward()
    assert time.monotonic() - begin < 5
    raise AssertionError(f"said: {caught.value}")


def test_a_rank_that_has_died_is_named(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRY_STORE", str(tmp_path / "store"))
    own = Ranks()
    try:
        with pytest.raises(RankError, match="running the callback: _MissingError: shared memory: rank 1 has ended"):
            own.run(killed, world_size=2)
    finally:
        own.close()


def released(rank: int, world_size: int) -> tuple[int, int]:
    def threads() -> int:
        return sum(thread.name == "syncbn gradients" for thread in threading.enumerate())

    def mapped() -> int:
        return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:syncbn")

    channels.channel(dist.group.WORLD)  # has memory of its own
    gc.collect()
    before = threads(), mapped()
    model = wrapped(network())
    model(torch.ones(5, 7)).sum().backward()
    assert (threads(), mapped()) == (before[0] + 1, before[1] + 2)
    del model
    gc.collect()
    deadline = time.monotonic() + 10
    while (threads(), mapped()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    return threads() - before[0], mapped() - before[1]


def test_thread_and_memory_go_with_the_model(ranks: Ranks) -> None:
    assert ranks.run(released, world_size=2, fresh=True) == [(0, 0)] * 2


def refused(rank: int, world_size: int) -> bool:
    with mock.patch.dict(os.environ, {"SYNCBN_SHARED_MEMORY": "0"} if rank == 1 else {}):
        return shared_gradients.register(DistributedDataParallel(network()))


def test_where_one_rank_cannot_all_use_gloo(ranks: Ranks) -> None:
    assert ranks.run(refused, world_size=2, fresh=True) == [False, False]
