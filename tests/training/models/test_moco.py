"""MoCo on several ranks against one process, its queue, its key network, and a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.training import MoCo
from syncbn.training.norm.replace import remove_batch_norm
from tests.support.ranks import Ranks
from tests.support.refuses import refuses
from tests.training.models.test_simclr import Step, module, share, views
from tests.training.support.faulty_runs import differences, fault, faulty

MOMENTUM, QUEUE = 0.8, 10


def trained(step: torch.nn.Module, of_rank: Any = lambda x: x, steps: int = 3) -> dict[str, Tensor]:
    """The state after some steps of 7 images each."""
    first, second = views(7 * steps)
    moco = getattr(step, "module", step)
    moco = moco.module if hasattr(moco, "module") else moco
    optimizer = torch.optim.SGD(moco.network.parameters(), 0.5)
    for number in range(steps):
        batch = (of_rank(each[7 * number : 7 * number + 7]) for each in (first, second))
        optimizer.zero_grad()
        step(*batch).backward()
        optimizer.step()
    return moco.state_dict()


def state_of_rank(rank: int, world_size: int, counts: tuple[int, ...]) -> dict[str, Tensor]:
    step = Step(syncbn.convert(module(MoCo, momentum=MOMENTUM, queue=QUEUE)), world_size)
    return trained(DistributedDataParallel(step), lambda x: share(x, rank, counts))


@pytest.mark.parametrize("counts", [(4, 3), (3, 0, 4)])
def test_several_ranks_train_as_one_process(ranks: Ranks, counts: tuple[int, ...]) -> None:
    """Weights of both networks, queue and running statistics."""
    expected = trained(Step(module(MoCo, momentum=MOMENTUM, queue=QUEUE), 1))
    found = ranks.run(state_of_rank, counts, world_size=len(counts))
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-12, msg=name)
        assert all(torch.equal(each[name], found[0][name]) for each in found), name


def test_the_newest_keys_are_in_the_queue() -> None:
    moco = module(MoCo, momentum=MOMENTUM, queue=QUEUE)
    before = moco.queue.clone()
    keys: list[Tensor] = []
    moco.key_network.register_forward_hook(lambda *call: keys.append(call[-1]))
    state = trained(Step(moco, 1), steps=1)
    assert torch.equal(state["queue"], torch.cat([keys[0], before[:3]]))
    trained(Step(moco, 1), steps=1)
    assert torch.equal(moco.queue, torch.cat([keys[1], keys[0][:3]]))
    assert torch.isfinite(moco.queue).all()
    torch.testing.assert_close(moco.queue.norm(dim=1), torch.ones(QUEUE, dtype=torch.float64))


def test_the_key_network_is_a_moving_average() -> None:
    """It moves before it embeds keys, so after the second step it has seen the weights after the first."""
    moco = module(MoCo, momentum=MOMENTUM, queue=QUEUE)
    start = [p.clone() for p in moco.network.parameters()]
    trained(Step(moco, 1), steps=1)
    assert all(torch.equal(key, first) for key, first in zip(moco.key_network.parameters(), start, strict=True))
    after_one = [p.detach().clone() for p in moco.network.parameters()]
    assert not torch.equal(start[0], after_one[0])
    trained(Step(moco, 1), steps=1)
    for key, first, second in zip(moco.key_network.parameters(), start, after_one, strict=True):
        torch.testing.assert_close(key, MOMENTUM * first + (1 - MOMENTUM) * second)
        assert not key.requires_grad
        assert key.grad is None


def test_biases_that_norm_none_adds_to_the_key_network_do_not_train() -> None:
    moco = module(MoCo)
    remove_batch_norm(moco)
    moco.setup("fit")
    assert len(list(moco.key_network.parameters())) == len(list(moco.network.parameters()))
    assert not any(p.requires_grad for p in moco.key_network.parameters())


@pytest.mark.parametrize(("setting", "value"), [("momentum", 1.0), ("queue", 0)])
def test_settings_out_of_their_range_are_refused(setting: str, value: float) -> None:
    with refuses(f"module.{setting}", value, "use"):
        module(MoCo, **{setting: value})


def test_killed_and_resumed_is_bitwise_the_same(tmp_path: Path) -> None:
    settings = ["experiment=moco", "module=moco", "model=mlp", "data=digit_views", "trainer.max_epochs=2", "seed=1"]
    settings += [
        "norm=shuffle",
        "norm.part=key_network",
        "simulate=2",
        "data.batch_size=32",
        "resume.every_n_steps=5",
        "callbacks.checkpoint.monitor=null",
    ]
    straight = faulty(tmp_path, *settings, "run.id=straight").ended()
    killed = fault(tmp_path, "kill_everything", epoch=1, batch=7)
    first = faulty(tmp_path, *settings, "run.id=resumed", killed)
    assert first.code == -9
    second = faulty(tmp_path, *settings, "run.id=resumed", killed).ended()
    assert "it resumes from" in second.out
    assert differences(straight, second) == []
    last = torch.load(second.directory / "checkpoints/last.ckpt", weights_only=True)  # type: ignore[operator]
    assert last["state_dict"]["queue"].shape == (512, 64)
