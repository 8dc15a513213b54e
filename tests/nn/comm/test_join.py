"""DDP's join(): refused where ranks that ran out of batches would leave the layer's all-reduce to the others."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.support.ranks import Ranks

WORKS = r"use join\(throw_on_early_termination=True\), or give each rank as many batches"


def a_model(group: object = "world", compiled: bool = False) -> DistributedDataParallel:
    torch.manual_seed(0)
    net = syncbn.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), group=group)
    return DistributedDataParallel(torch.compile(net, backend="eager") if compiled else net)


class Other(Joinable):
    """What else may be listed in ``Join([...])``, such as an optimizer."""

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__()
        self.model = model

    @property
    def join_device(self) -> torch.device:
        return self.model.join_device

    @property
    def join_process_group(self) -> object:
        return self.model.join_process_group

    def join_hook(self, **_: object) -> JoinHook:
        return JoinHook()


def train(model: nn.Module, batches: int) -> None:
    for _ in range(batches):
        model(batch()).sum().backward()
        model.steps = getattr(model, "steps", 0) + 1


def batch() -> Tensor:
    return torch.randn(4, 3)


def refused(rank: int, world_size: int, how: str) -> str:
    model = a_model(compiled="compiled" in how)
    contexts = {
        "join": lambda: model.join(),
        "compiled join": lambda: model.join(),
        "Join": lambda: Join([model, Other(model)]),
        "second": lambda: Join([Other(model), model], throw_on_early_termination=True),
    }
    with pytest.raises(RuntimeError) as refusal, contexts[how]():
        train(model, (2, 3)[rank])
    return str(refusal.value)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # what torch sets off
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("how", "works"),
    [
        ("join", WORKS),
        ("compiled join", WORKS),
        ("Join", WORKS),
        ("second", r"list the DistributedDataParallel first in Join\(\[\.\.\.\]\)"),
    ],
)
def test_a_join_that_cannot_work_is_refused_on_every_rank(ranks: Ranks, how: str, works: str) -> None:
    for message in ranks.run(refused, how, world_size=2, timeout=30, fresh=True):
        assert re.fullmatch(rf"layer 1 forward: join\(\): a rank out of batches would skip .*; {works}.*", message)


def ended_early(rank: int, world_size: int, how: str) -> tuple[int, str]:
    model = a_model()
    context = {"join": model.join, "Join": lambda **throws: Join([model, Other(model)], **throws)}[how]
    with pytest.raises(RuntimeError) as end, context(throw_on_early_termination=True):
        train(model, (2, 4)[rank])
    return model.steps, str(end.value)


@pytest.mark.parametrize("how", ["join", "Join"])
def test_a_join_that_ends_all_ranks_together_works(ranks: Ranks, how: str) -> None:
    (first, out), (second, told) = ranks.run(ended_early, how, world_size=2, timeout=30, fresh=True)
    assert (first, second) == (2, 2)
    assert "exhausted all inputs" in out
    assert "Detected at least one rank that exhausted inputs" in told


def allowed(rank: int, world_size: int) -> None:
    model = a_model()
    with model.join(enable=False):  # the same number of batches, one of them empty
        model(batch()[: 4 * rank]).sum().backward()
    with model.join():  # nothing is sent in evaluation
        train(model.eval(), rank + 1)
    alone = a_model(group=1)
    with alone.join():
        train(alone, rank + 1)
    after = a_model()
    with after.join(throw_on_early_termination=True):
        train(after, 1)


def test_where_no_rank_would_wait_a_join_is_no_matter(ranks: Ranks) -> None:
    ranks.run(allowed, world_size=2, timeout=30, fresh=True)
