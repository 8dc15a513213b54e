"""Frozen parts: right under DDP, no all-reduce where none is needed, and the mode of batch norm survives an epoch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.testing import force_exchange
from syncbn.training.models.classifier import Classifier, parameter_groups
from syncbn.training.models.networks import ResNet
from syncbn.training.network.freeze import FreezeNorm, freeze
from tests.support.ranks import Ranks
from tests.support.refuses import refuses
from tests.training.support.faulty_runs import differences, fault
from tests.training.support.train_command import train

GLOBS = ["stem*", "stages.0"]


def network(*, evaluates: bool) -> nn.Module:
    torch.manual_seed(0)
    net = ResNet(width=4).double()
    freeze(net, GLOBS)
    if evaluates:
        keep = FreezeNorm(GLOBS)
        keep.on_train_start(None, net)  # type: ignore[arg-type]
        keep.on_train_batch_start(None, net.train())  # type: ignore[arg-type]
    return net


def steps(net: nn.Module, parts: list[Tensor]) -> dict[str, Tensor]:
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    optimizer = torch.optim.SGD(parameter_groups(inner), lr=0.1)
    for part in parts:
        net(part).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return inner.state_dict()


def batches() -> list[Tensor]:
    return list(torch.randn(3, 8, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def on_two(rank: int, world_size: int, evaluates: bool) -> dict[str, Tensor]:
    net = DistributedDataParallel(syncbn.convert(network(evaluates=evaluates)))
    return steps(net, [whole.chunk(world_size)[rank] for whole in batches()])


@pytest.mark.parametrize("evaluates", [True, False])
def test_two_ranks_train_as_one_process_with_the_whole_batch(ranks: Ranks, evaluates: bool) -> None:
    before, expected = network(evaluates=evaluates).state_dict(), steps(network(evaluates=evaluates), batches())
    for state in ranks.run(on_two, evaluates, world_size=2):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)
        frozen = [name for name in before if name.startswith(("stem.", "stages.0."))]
        moved = {name for name in frozen if not torch.equal(state[name], before[name])}
        running = {name for name in frozen if name.endswith(("_mean", "_var", "_tracked"))}
        assert moved == (set() if evaluates else running)
        assert not torch.equal(state["head.weight"], before["head.weight"])


def collectives(rank: int, world_size: int, frozen: bool, evaluates: bool) -> int:
    """All-reduces of one step of a network whose every batch norm is frozen, or of none."""
    from torch.profiler import ProfilerActivity, profile

    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    if frozen:
        freeze(net, ["0", "1"])
    syncbn.convert(net)
    if evaluates:
        net[1].eval()
    with force_exchange(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        net(torch.randn(4, 1, 8, 8)).sum().backward()
    return sum(each.count for each in recorded.key_averages() if "syncbn" in each.key or "allreduce" in each.key)


def test_a_frozen_layer_sends_what_a_frozen_layer_of_torch_needs(ranks: Ranks) -> None:
    cases = [(False, False), (True, False), (True, True)]
    trains, moves, rests = (ranks.run(collectives, *case, world_size=2)[0] for case in cases)
    assert trains > moves > rests == 0


def test_a_glob_that_matches_nothing_and_one_that_leaves_nothing() -> None:
    with refuses("freeze", "stam*", "the nearest are stem"):
        freeze(ResNet(), ["stem*", "stam*"])
    with refuses("freeze", ["*"], "nothing is left to train"):
        freeze(ResNet(), ["*"])


def test_the_optimizer_holds_what_trains() -> None:
    module = Classifier(ResNet(), lambda groups: torch.optim.SGD(groups, lr=0.1), num_classes=10)
    freeze(module, ["network.stem*"])
    optimizer: Any = module.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in module.named_parameters() if not name.startswith("network.stem")}


def test_a_run_with_frozen_parts_resumes_bitwise(tmp_path: Any) -> None:
    same = ('freeze=["network.stem*","network.stages.0"]', "logger=csv", "trainer.max_epochs=2")
    same += ("resume.every_n_steps=5", "channels_last=true", 'checkpoint_activations=["*stages*"]')
    straight = train(tmp_path, *same, "run.id=straight").ended()
    killing = fault(tmp_path, "kill_everything", epoch=1, batch=8)
    assert train(tmp_path, *same, killing, "run.id=resumed").code == -9
    resumed = train(tmp_path, *same, killing, "run.id=resumed").ended()
    assert differences(straight, resumed) == []
    assert straight.directory is not None
    state = torch.load(straight.directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not state["network.stem.1.num_batches_tracked"]  # also after epochs with validations
    assert state["network.stages.1.bn1.num_batches_tracked"] == 36
