"""``norm=shuffle``: the plugin around one part of a module, and processes against simulated devices."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn.nn import simulation
from syncbn.training import ShufflePlugin
from syncbn.training.errors import AgreedError
from syncbn.training.launch import summary
from syncbn.training.norm.replace import prepare_model
from syncbn.training.norm.shuffle_plugin import RefuseUnshuffled
from syncbn.training.norm.trainer_parts import parts
from tests.support.ranks import Ranks
from tests.support.refuses import refuses as refuses_setting
from tests.training.norm.test_simulated_devices import SMALL, by_step, figures
from tests.training.support.faulty_runs import fault
from tests.training.support.settled_config import settled
from tests.training.support.train_command import Run, train


def refuses(part: str, *words: str) -> AbstractContextManager[None]:
    return refuses_setting("norm.part", part, *words, kind=AgreedError)


class Seen(nn.Module):
    """A batch norm, of which the inputs are kept, and what ``returns`` makes of the outputs."""

    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.returns = returns
        self.inputs: list[list[float]] = []

    def forward(self, x: Tensor, *more: Any, weights: Tensor | None = None) -> Any:
        self.inputs.append(x.flatten().tolist())
        for each in (more[0]["also"], weights) if more else ():
            assert torch.equal(each, x)
        self.norm(x)
        return self.returns(x)


class Model(nn.Module):
    """As much of a LightningModule as the plugin needs: its trainer knows the number of the batch."""

    def __init__(self, returns: Callable[[Tensor], Any] = lambda x: 2 * x) -> None:
        super().__init__()
        self.part = Seen(returns)
        self.head = nn.Linear(1, 1)
        self.trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=0), lock=(lambda: (yield))())

    def at(self, batch: int) -> nn.Module:
        self.trainer.fit_loop.total_batch_idx = batch
        return self.part


def samples(count: int = 16) -> Tensor:
    return torch.arange(float(count)).view(-1, 1)


def test_the_order_depends_on_seed_batch_and_call_alone() -> None:
    def orders(seed: int, *batches: int) -> list[list[float]]:
        model = Model()
        ShufflePlugin("part", seed=seed).apply(model)
        for batch in batches:
            assert torch.equal(model.at(batch)(samples()), 2 * samples())
        return model.part.inputs

    found = orders(1, 0, 0, 1, 2)
    assert len({tuple(order) for order in [*found, *orders(2, 0)]}) == 5
    assert all(sorted(order) == samples().flatten().tolist() != order for order in found)
    assert orders(1, 0, 0) == found[:2]
    assert orders(1, 1) == found[2:3]  # as after a resume


def test_all_arguments_are_moved_alike_and_all_outputs_back() -> None:
    model = Model(lambda x: {"y": (x, [x.long()]), "none": None})
    ShufflePlugin("part").apply(model)
    output = model.part(samples(), {"also": samples(), "how": "fast"}, weights=samples())
    assert model.part.inputs[0] != samples().flatten().tolist()
    assert output["none"] is None
    assert torch.equal(output["y"][0], samples())
    assert torch.equal(output["y"][1][0], samples().long())


def test_in_evaluation_and_after_revert_nothing_is_moved() -> None:
    model, plugin = Model(), ShufflePlugin("part")
    plugin.apply(model)
    model.eval()
    model.part(samples())
    model.train()
    plugin.revert(model)
    model.part(samples())
    assert model.part.inputs == [samples().flatten().tolist()] * 2
    assert not model.part._forward_pre_hooks
    assert not model.part._forward_hooks
    assert not plugin.has_shuffled


def test_a_copy_of_the_part_is_no_copy_of_the_trainer() -> None:
    model = Model()  # its trainer cannot be copied
    ShufflePlugin("part").apply(model)
    twin = copy.deepcopy(model.part)
    assert torch.equal(twin(samples()), 2 * samples())


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)), nn.ReLU())


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("key_network", ("Nested has no such submodule; those with batch norm are network, network.1",)),
        ("network.0", ("it has no batch norm; those with batch norm are network, network.1",)),
        ("network.2", ("it has no batch norm",)),
    ],
)
def test_a_part_that_cannot_be_shuffled_is_refused(part: str, words: tuple[str, ...]) -> None:
    with refuses(part, *words):
        ShufflePlugin(part).apply(Nested())
    with refuses(part, *words):
        prepare_model(Nested(), {"name": "shuffle", "part": part})
    prepare_model(Nested(), {"name": "shuffle", "part": "network.1.0"})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.part(samples(), torch.tensor(2.0)), "shapes [(16, 1), ()]; all must begin with the samples"),
        (lambda m: m.part(samples(), samples(4)), "shapes [(16, 1), (4, 1)]"),
        (lambda m: m.part("images"), "shapes []"),
    ],
)
def test_other_arguments_are_refused(call: Callable[[Model], Any], words: str) -> None:
    model = Model()
    ShufflePlugin("part").apply(model)
    with refuses("part", words):
        call(model)


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        (lambda x: x.sum(), "one of its outputs has the shape (); all must begin with the samples"),
        (lambda x: (x, x[1:]), "one of its outputs has the shape (15, 1)"),
        (lambda x: {"loss": 0.5}, "one of its outputs is float; all must be tensors"),
    ],
)
def test_other_outputs_are_refused(returns: Callable[[Tensor], Any], words: str) -> None:
    model = Model(returns)
    ShufflePlugin("part").apply(model)
    with refuses("part", words):
        model.part(samples())


def test_a_part_that_is_not_called_is_reported() -> None:
    (plugin,), callbacks, _ = parts({"name": "shuffle", "part": "part"}, seed=3)
    assert plugin.seed == 3
    (check,) = (each for each in callbacks if isinstance(each, RefuseUnshuffled))
    model = plugin.apply(Model())
    model.part.forward(samples())
    with refuses("part", "training_step did not call this part"):
        check.on_train_batch_end()
    model.part(samples())
    check.on_train_batch_end()


def test_a_recomputation_takes_the_same_order() -> None:
    """The part is within what is computed again: its batch norm must see the same samples, and once."""
    model = Model(lambda x: x.exp())
    ShufflePlugin("part").apply(model)
    x = (samples() / 16).requires_grad_()
    weights = torch.arange(16.0).view(-1, 1)
    (checkpoint(model.part, x, use_reentrant=False) * weights).sum().backward()
    first, again = model.part.inputs
    assert first == again != samples().flatten().tolist()
    torch.testing.assert_close(x.grad, x.exp() * weights)
    y = checkpoint(lambda x: model.part(model.part(x)), x, use_reentrant=False)
    with refuses("part", "and a batch calls it 3 times", "recompute parts inside it"):
        y.sum().backward()


def test_compiled_in_place_it_is_shuffled_too() -> None:
    model = Model()
    ShufflePlugin("part").apply(model)
    model.part.compile(backend="eager")
    for batch in (0, 1):
        assert torch.equal(model.at(batch)(samples()), 2 * samples())
    assert model.part.inputs[0] != model.part.inputs[1]


class Noted(LayerSync):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def apply(self, model: nn.Module) -> nn.Module:
        self.calls.append("apply")
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        self.calls.append("revert")
        return model


def test_another_plugin_for_the_layers() -> None:
    layers, model = Noted(), Model()
    plugin = ShufflePlugin("part", layers=layers)
    assert plugin.revert(plugin.apply(model)) is model
    assert layers.calls == ["apply", "revert"]


def network() -> Model:
    torch.manual_seed(4)
    model = Model()
    model.part = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2), nn.BatchNorm1d(2))
    return model.double()


def batches(count: int, size: int) -> Tensor:
    return torch.randn(count, size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def trained(model: Model, forward: nn.Module, data: list[Tensor], accumulate: int) -> dict[str, Tensor]:
    """Samples have different weights in the loss, so that it matters which sample an output is returned to."""
    optimizer = torch.optim.SGD(model.part.parameters(), lr=0.1)
    for number, x in enumerate(data):
        model.at(number)
        (forward(x) * x.exp()).mean().div(accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.part.state_dict())


def as_ranks(rank: int, world_size: int) -> dict[str, Tensor]:
    model = network()
    plugin = ShufflePlugin("part", seed=9)
    plugin.apply(model)
    ddp = DistributedDataParallel(model.part)
    state = trained(model, ddp, list(batches(6, 4 * world_size)[:, rank::world_size]), 2)
    plugin.revert(model)
    return state


@pytest.mark.parametrize("world_size", [2, 3])
def test_simulated_devices_with_gradient_accumulation_train_as_ranks(ranks: Ranks, world_size: int) -> None:
    expected = ranks.run(as_ranks, world_size=world_size)[0]

    def alone(plugin: ShufflePlugin | None) -> dict[str, Tensor]:
        model = network()
        if plugin is not None:
            plugin.apply(model)
        simulation.simulate(model, world_size, accumulate=2)
        return trained(model, model.part, list(batches(6, 4 * world_size).view(3, -1, 2)), 1)

    found = alone(ShufflePlugin("part", seed=9, batches_at_once=2))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for other in (None, ShufflePlugin("part", seed=8, batches_at_once=2)):
        assert (alone(other)["0.weight"] - expected["0.weight"]).abs().max() > 1e-4
    with refuses("part", "7 samples cannot be cut into 2 batches"):
        model = ShufflePlugin("part", batches_at_once=2).apply(network())
        model.part(batches(1, 7)[0])


def test_the_first_line_says_over_how_many_devices() -> None:
    plan = settled("norm=shuffle", "simulate=16", "data.batch_size=4")
    line = "4 samples each; norm shuffle of samples over 16 devices, in network: statistics of 4 samples"
    assert summary.headline(plan).endswith(line)
    assert plan.normalization_batch == 4


RUN = [*SMALL, "data.batch_size=8", "norm=shuffle", "plots=false", "trainer.max_epochs=1", "test=false"]


def without_times(run: Run) -> list[dict[str, float]]:
    return [{name: row[name] for name in row if name != "statistics/collective_share"} for row in figures(run)]


def test_one_process_trains_as_two_and_resumes_bitwise(tmp_path: Path) -> None:
    accumulated = "trainer.accumulate_grad_batches=2"
    one = train(tmp_path, *RUN, accumulated, "simulate=2", "run.id=one")
    settings = [*RUN, accumulated, "trainer.devices=2", "resume.every_n_steps=15"]
    two = train(tmp_path, *settings, "run.id=two")
    found, expected = by_step(one), by_step(two)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-6, abs=1e-9), key
    stop = fault(tmp_path, "kill", epoch=0, batch=40)
    assert train(tmp_path, *settings, "run.id=parts", stop).code == 1
    rest = train(tmp_path, *settings, "run.id=parts")
    assert "resumes from" in rest.out
    assert without_times(rest) == without_times(two)


def test_the_last_batch_may_be_uneven(tmp_path: Path) -> None:
    run = train(tmp_path, *RUN, "trainer.devices=2", "data.remainder=uneven", "data.val_fraction=0.083").ended()
    assert "norm shuffle of samples over 2 devices, in network" in run.out
    assert run.json("result")["steps"] * 16 > 1019
