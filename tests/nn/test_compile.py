"""``torch.compile(fullgraph=True)`` takes the whole layer, forward, message and backward, and changes no result."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.testing import force_exchange
from tests.nn.support.oracle import CHANNELS, Step, close, each_option, make_steps, named, one_process
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Ranks, messages

# What torch itself sets off when it compiles, and which would break a trace in the middle where a warning is an error.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
PATIENCE = 100  # seconds: the first compilation in a process may find nothing in inductor's cache


class Net(nn.Module):
    """A small convolutional net; the mask, if any, is for its batch norm."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 4, 3, padding=1, bias=False, dtype=torch.float64)
        self.norm = parameters(syncbn.SyncBatchNorm2d(4, dtype=torch.float64, **options))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.relu(self.norm(self.conv(x), mask))


class Deep(nn.Module):
    """Several batch norms whose messages are of one size, and say that there are as many values."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False, dtype=torch.float64)]
            layers += [parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.norm = layers[-2]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result


def a_net(**options: object) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def train(net: nn.Module, call: Callable, steps: list[Step], rank: int, masked: bool) -> dict[str, Tensor]:
    results = {}
    for number, step in enumerate(steps):
        x = step.x[rank].detach().requires_grad_()
        y = call(x, x[:, 0] > 0) if masked else call(x)
        y.square().sum().backward()
        results |= {f"y{number}": y.detach(), f"dx{number}": x.grad}
    results |= {f"{name}.grad": parameter.grad for name, parameter in net.named_parameters()}
    return results | {name: buffer.clone() for name, buffer in net.named_buffers()}


def both(
    rank: int, world_size: int, net: nn.Module, steps: list[Step], how: str, backend: str, masked: bool
) -> tuple[dict, dict]:
    """The results in eager mode and compiled."""
    torch._dynamo.reset()
    if hasattr(net, "group_of"):
        net.norm.group = syncbn.nn.comm.groups.parse(dist.new_group(net.group_of))
    eager, again = net, deepcopy(net)
    with force_exchange():
        plain = train(eager, DistributedDataParallel(eager) if "ddp" in how else eager, steps, rank, masked)
        if how == "compile":
            call: Callable = torch.compile(again, fullgraph=True, backend=backend)
        elif how == "ddp(compile)":
            call = DistributedDataParallel(torch.compile(again, fullgraph=True, backend=backend))
        else:
            call = torch.compile(DistributedDataParallel(again), backend=backend)
        compiled = train(again, call, steps, rank, masked)
    return plain, compiled


def compare(
    ranks: Ranks, net: nn.Module, cut: list[int], *, how: str = "compile", backend: str = "aot_eager",
    masked: bool = False, count: int = 2,
) -> None:  # fmt: skip
    steps = make_steps(cut, (4, 3), count=count)
    results = ranks.run(both, net, steps, how, backend, masked, world_size=len(cut), timeout=PATIENCE)
    for rank, (plain, compiled) in enumerate(results):
        assert plain.keys() == compiled.keys()
        for name, value in plain.items():
            if value is None:
                assert compiled[name] is None
            else:
                close(compiled[name], value, 1e-10, f"{name}, rank {rank}")
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        if name in results[0][0] and net.norm.group == "world" and net.norm.ghost_batch is None:
            assert all(torch.equal(results[0][1][name], compiled[name]) for _, compiled in results), name


def compile_a_function(rank: int, world_size: int) -> None:
    torch.compile(lambda x: x.relu() + 1, backend="inductor")(torch.ones(8))


@pytest.fixture(scope="module")
def inductor(ranks: Ranks) -> None:
    """Inductor has what it makes once for all graphs, its precompiled header among it."""
    ranks.run(compile_a_function, world_size=1, timeout=PATIENCE)


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("cut", [[4, 4], [2, 6]], ids=named)
def test_inductor_takes_several_layers_of_one_size(ranks: Ranks, cut: list[int]) -> None:
    torch.manual_seed(0)
    compare(ranks, Deep(), cut, backend="inductor")


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("cut", [[8], [2, 6]], ids=named)
def test_inductor_equals_eager(ranks: Ranks, cut: list[int], masked: bool) -> None:
    compare(ranks, a_net(), cut, backend="inductor", masked=masked)


@each_option(
    {"momentum": None},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"biased_running_var": True},
    {"ghost_batch": 2},
)
@pytest.mark.parametrize(("cut", "masked"), [([8], False), ([2, 6], False), ([2, 6], True)], ids=str)
def test_every_option_in_one_graph_equals_eager(ranks: Ranks, cut: list[int], masked: bool, options: dict) -> None:
    compare(ranks, a_net(**options), cut, masked=masked)


def test_inductor_takes_a_cumulative_average(ranks: Ranks) -> None:
    compare(ranks, a_net(momentum=None), [2, 6], backend="inductor")


def test_frozen_weights_in_one_graph_equal_eager(ranks: Ranks) -> None:
    net = a_net()
    net.norm.requires_grad_(False)
    compare(ranks, net, [2, 6])


@pytest.mark.parametrize("group", [1, 2, "node"])
def test_every_group_in_one_graph_equals_eager(ranks: Ranks, group: object) -> None:
    compare(ranks, a_net(group=group), [2, 6])


def test_subgroups_of_two_in_one_graph_equal_eager(ranks: Ranks) -> None:
    compare(ranks, a_net(group=2), [2, 3, 4, 1])


def test_a_process_group_in_one_graph_equals_eager(ranks: Ranks) -> None:
    net = a_net()
    net.group_of = [0, 1]
    compare(ranks, net, [2, 6])


@pytest.mark.parametrize("how", ["ddp(compile)", "compile(ddp)"])
@pytest.mark.parametrize(("backend", "cut"), [("aot_eager", [8]), ("aot_eager", [2, 6]), ("inductor", [2, 6])], ids=str)
def test_with_ddp_it_equals_eager_ddp(ranks: Ranks, backend: str, cut: list[int], how: str) -> None:
    compare(ranks, a_net(), cut, how=how, backend=backend)


@pytest.mark.parametrize("kind", [(), (5,), (4, 3), (2, 3, 2)], ids=["2d", "3d", "4d", "5d"])
def test_a_lone_layer_of_any_dimension_equals_eager(kind: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    layer = parameters(syncbn.SyncBatchNorm(CHANNELS, dtype=torch.float64))
    again = deepcopy(layer)
    steps = make_steps([6], kind, count=2)
    plain = train(layer, layer, steps, 0, False)
    compiled = train(again, torch.compile(again, fullgraph=True, backend="aot_eager"), steps, 0, False)
    for name, value in plain.items():
        close(compiled[name], value, 1e-10, name)


def in_eval(rank: int, world_size: int, net: nn.Module, x: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    torch._dynamo.reset()
    net.eval()
    mask = x[:, 0] > 0 if masked else None
    return net(x, mask).detach(), torch.compile(net, fullgraph=True, backend="aot_eager")(x, mask).detach()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_eval_equals_eager(ranks: Ranks, masked: bool) -> None:
    (step,) = make_steps([4], (4, 3))
    for plain, compiled in ranks.run(in_eval, a_net(), step.x[0], masked, world_size=2, timeout=PATIENCE):
        close(compiled, plain, 1e-10, "y")


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_an_empty_batch_on_one_rank_equals_eager(ranks: Ranks, masked: bool, affine: bool) -> None:
    # The sums of an empty batch are constants; were they so in the graph, their message would go to both passes.
    compare(ranks, a_net(affine=affine), [0, 8], masked=masked)


def with_or_without(rank: int, world_size: int, layer: nn.Module, step: Step, needs: list[bool]) -> Tensor | None:
    torch._dynamo.reset()
    x = step.x[rank].detach().requires_grad_(needs[rank])
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).backward(step.dy[rank])
    return x.grad


@pytest.mark.parametrize(("cut", "needs"), [([3, 5], [False, True]), ([8, 0], [True, False])], ids=str)
def test_a_rank_whose_input_needs_no_gradient_serves_the_others(
    ranks: Ranks, cut: list[int], needs: list[bool]
) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    (step,) = steps = make_steps(cut, (4, 3))
    expected = one_process(layer, steps)
    for rank, dx in enumerate(ranks.run(with_or_without, layer, step, needs, world_size=2, timeout=PATIENCE)):
        if needs[rank]:
            close(dx, expected.dx[0][rank], 1e-10, f"dx, rank {rank}")
        else:
            assert dx is None


def frozen_in_a_graph(rank: int, world_size: int, layer: nn.Module, step: Step, need: bool) -> tuple:
    torch._dynamo.reset()
    x = step.x[rank].detach().requires_grad_(need)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    with messages() as sent:
        if y.requires_grad:
            y.backward(step.dy[rank])
    return x.grad, y.requires_grad, len(sent)


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("affine", [True, False], ids=["frozen", "affine=False"])
def test_a_frozen_layer_sends_backward_only_where_its_input_needs_a_gradient(
    ranks: Ranks, affine: bool, need: bool
) -> None:
    # In a graph a rank cannot read what the others need, so that it goes by its own input: they must be alike.
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, affine=affine, dtype=torch.float64)).requires_grad_(False)
    (step,) = steps = make_steps([3, 5], (4, 3))
    expected = one_process(layer, steps)
    for rank, (dx, y_needs, sent) in enumerate(
        ranks.run(frozen_in_a_graph, layer, step, need, world_size=2, timeout=PATIENCE)
    ):
        assert (y_needs, sent) == (need, int(need))
        if need:
            close(dx, expected.dx[0][rank], 1e-10, f"dx, rank {rank}")


def one_value(rank: int, world_size: int, layer: nn.Module) -> dict[str, Tensor]:
    torch._dynamo.reset()
    with force_exchange():
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(int(rank == 0), CHANNELS))
    return layer.state_dict()


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_value_over_the_group_leaves_the_running_variance(ranks: Ranks, world_size: int) -> None:
    # Eager mode raises; in a graph nobody may look at the count.
    layer = syncbn.SyncBatchNorm1d(CHANNELS)
    for state in ranks.run(one_value, layer, world_size=world_size, timeout=PATIENCE):
        assert torch.equal(state["running_var"], torch.ones(CHANNELS))
        assert state["running_mean"].isfinite().all()


def test_shapes_can_be_asked_for_without_data() -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, biased_running_var=True)  # so that it is not torch's own forward pass
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, CHANNELS, 4, 4, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert y.shape == x.shape
    assert x.grad is not None
    assert x.grad.shape == x.shape


class InPlace(nn.Module):
    """The most usual neighbour: an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = parameters(syncbn.SyncBatchNorm1d(CHANNELS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).relu_()


def with_an_activation_in_place(rank: int, world_size: int, x: Tensor, compiled: bool) -> Tensor:
    torch._dynamo.reset()
    model: Callable[[Tensor], Tensor] = InPlace()
    if compiled:
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = x.requires_grad_()
    with force_exchange():
        y = model(x)
        y.square().sum().backward()
    assert x.grad is not None
    return torch.stack([y.detach(), x.grad])


@pytest.mark.parametrize("offset", [0.0, 100.0])  # near zero and centred first: routes of their own in eager mode
@pytest.mark.parametrize("compiled", [False, True])
def test_an_activation_in_place_may_follow(ranks: Ranks, compiled: bool, offset: float) -> None:
    x = torch.randn(6, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset
    (result,) = ranks.run(with_an_activation_in_place, x, compiled, world_size=1, timeout=PATIENCE)
    x.requires_grad_()
    layer = parameters(nn.BatchNorm1d(CHANNELS, dtype=torch.float64))
    expected = layer(x).relu()
    expected.square().sum().backward()
    close(result, torch.stack([expected, x.grad]), 1e-10, "y and dx")
