"""A gradient that is differentiated once more is right, across ranks, or it raises."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from syncbn.nn.autograd import double_backward
from syncbn.testing import force_exchange
from tests.nn.support.oracle import CHANNELS, LAYERS, SPATIAL, Step, close, each_option, make_steps, named
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Messages, Ranks, messages

TORCHS = {"2d": nn.BatchNorm1d, "3d": nn.BatchNorm1d, "4d": nn.BatchNorm2d, "5d": nn.BatchNorm3d}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
CUTS = [[8], [2, 6], [1, 7], [0, 8], [3, 3, 2], [1, 5, 2]]


def linear(y: Tensor, w: Tensor) -> Tensor:
    return (y * w).sum()


def curved(y: Tensor, w: Tensor) -> Tensor:
    """The gradient that comes in depends on the input too."""
    return (y.tanh() * w).sum() + 0.1 * y.pow(3).sum()


LOSSES = {"linear": linear, "curved": curved}


def penalty(layer: nn.Module, x: list[Tensor], w: list[Tensor], kind: str, add_loss: bool) -> list[Tensor]:
    """The gradient penalty's gradients: backward through the square norm of ``x``'s gradient. Pieces are one batch."""
    y = layer(torch.cat(x))
    loss = LOSSES[kind](y, torch.cat(w))
    first = torch.autograd.grad(loss, x, create_graph=True)
    total = sum(piece.square().sum() for piece in first)
    (total + loss if add_loss else total).backward()
    return [piece.detach() for piece in first]


def on_a_rank(rank: int, world_size: int, layer: nn.Module, step: Step, kind: str, add_loss: bool) -> dict:
    x = step.x[rank].detach().requires_grad_()
    with force_exchange():
        (first,) = penalty(layer, [x], [step.dy[rank]], kind, add_loss)
    return {"first": first, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


def compare(ranks: Ranks, layer: nn.Module, twin: nn.Module, step: Step, kind: str, add_loss: bool, tol: float) -> None:
    twin = twin.double()
    twin.load_state_dict(deepcopy(layer.state_dict()))
    x = [piece.detach().double().requires_grad_() for piece in step.x]
    first = penalty(twin, x, [w.double() for w in step.dy], kind, add_loss)
    results = ranks.run(on_a_rank, layer, step, kind, add_loss, world_size=len(x))
    scale = max(float(piece.grad.abs().max()) for piece in x if len(piece))

    def near(actual: Tensor, expected: Tensor, what: str) -> None:
        close(actual.double() / scale, expected.double() / scale, tol, what)

    for rank, result in enumerate(results):
        assert result["x"].dtype == step.x[rank].dtype
        near(result["first"], first[rank], f"first derivative, rank {rank}")
        near(result["x"], x[rank].grad, f"second derivative, rank {rank}")
    for name, parameter in twin.named_parameters():
        shares = [result[name] for result in results]
        if parameter.grad is None:  # a bias that the loss is linear in
            assert all(share is None or not share.any() for share in shares)
        else:
            near(sum(share for share in shares if share is not None), parameter.grad, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cut", CUTS, ids=named)
def test_a_gradient_penalty_equals_that_of_one_process(
    ranks: Ranks, cut: list[int], kind: str, loss: str, dtype: torch.dtype
) -> None:
    layer = parameters(LAYERS[kind](CHANNELS, dtype=dtype))
    (step,) = make_steps(cut, SPATIAL[kind], dtype=dtype)
    compare(ranks, layer, TORCHS[kind](CHANNELS), step, loss, False, TOLERANCE[dtype])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cut", [[8], [2, 6], [3, 3, 2]], ids=named)
def test_loss_and_penalty_together_equal_those_of_one_process(ranks: Ranks, cut: list[int], loss: str) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    (step,) = make_steps(cut, SPATIAL["4d"])
    compare(ranks, layer, nn.BatchNorm2d(CHANNELS), step, loss, True, 1e-10)


@each_option({"affine": False}, {"bias": False}, {"track_running_stats": False}, {"eps": 0.5})
@pytest.mark.parametrize("cut", [[8], [2, 6], [3, 3, 2]], ids=named)
def test_every_option_equals_one_process(ranks: Ranks, cut: list[int], options: dict) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64, **options))
    (step,) = make_steps(cut, SPATIAL["4d"])
    compare(ranks, layer, nn.BatchNorm2d(CHANNELS, **options), step, "curved", False, 1e-10)


@pytest.mark.parametrize("cut", [[8], [2, 6], [3, 3, 2]], ids=named)
def test_two_layers_and_convolutions_equal_one_process(ranks: Ranks, cut: list[int]) -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(CHANNELS, 4, 1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, CHANNELS, 1, bias=False),
            nn.BatchNorm2d(CHANNELS),
        ).double()

    (step,) = make_steps(cut, SPATIAL["4d"])
    compare(ranks, syncbn.convert(parameters(net())), net(), step, "curved", True, 1e-9)


class Functional(nn.Module):
    """The functional form, with its parameters to hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CHANNELS, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(CHANNELS, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return syncbn.sync_batch_norm(x, None, None, self.weight, self.bias, training=True)


@pytest.mark.parametrize("cut", [[8], [2, 6], [3, 3, 2]], ids=named)
def test_the_function_equals_one_process(ranks: Ranks, cut: list[int]) -> None:
    (step,) = make_steps(cut, SPATIAL["4d"])
    twin = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    compare(ranks, parameters(Functional()), twin, step, "curved", False, 1e-10)


def checked_by_differences(rank: int, world_size: int, affine: bool, masked: bool, third: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 2, generator=generator) < 0.7 if masked else None
    weight, bias = (torch.rand(2, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    inputs = (x, weight.requires_grad_(), bias.requires_grad_()) if affine else (x,)

    def forward(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return syncbn.sync_batch_norm(x, None, None, weight, bias, training=True, mask=mask)

    def gradient(*inputs: Tensor) -> Tensor:
        return torch.autograd.grad(forward(*inputs).pow(3).sum(), inputs[0], create_graph=True)[0]

    with force_exchange():
        assert torch.autograd.gradgradcheck(gradient if third else forward, inputs)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_finite_differences_agree_with_the_second_derivative(ranks: Ranks, affine: bool, masked: bool) -> None:
    ranks.run(checked_by_differences, affine, masked, False, world_size=1)


def test_finite_differences_agree_with_the_third_derivative(ranks: Ranks) -> None:
    ranks.run(checked_by_differences, True, False, True, world_size=1)


def count_messages(rank: int, world_size: int, layer: nn.Module, step: Step) -> tuple[Messages, Messages]:
    x = step.x[rank].requires_grad_()
    loss = linear(layer(x), step.dy[rank])
    with messages() as plain:
        torch.autograd.grad(loss, x, retain_graph=True)
    with messages() as created:
        torch.autograd.grad(loss, x, create_graph=True)
    return plain, created


def test_only_create_graph_pays_for_it(ranks: Ranks) -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64)
    (step,) = make_steps([2, 6], SPATIAL["4d"])
    for plain, created in ranks.run(count_messages, layer, step, world_size=2):
        assert plain.payloads == [("all_reduce", [2 * CHANNELS], "double")]
        assert len(created) > 1


def compiled_penalty(
    rank: int, world_size: int, layer: nn.Module, step: Step, backend: str, add_loss: bool
) -> Tensor | None:
    torch._dynamo.reset()
    x = step.x[rank].requires_grad_()
    with force_exchange():
        try:
            penalty(torch.compile(layer, backend=backend), [x], [step.dy[rank]], "curved", add_loss)
        except RuntimeError as error:
            if "double backward" not in str(error):
                raise
            return None
    return x.grad


# Not for backend="eager", dynamo's own debugging aid: there torch drops the second derivative of any autograd.Function.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own doing
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("add_loss", [False, True], ids=["penalty", "with_loss"])
@pytest.mark.parametrize("cut", [[8], [2, 6]], ids=named)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_it_raises_or_is_right(ranks: Ranks, backend: str, cut: list[int], add_loss: bool) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    (step,) = make_steps(cut, SPATIAL["4d"])
    results = ranks.run(compiled_penalty, layer, step, backend, add_loss, world_size=len(cut), timeout=100)
    twin = nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    x = [piece.clone().requires_grad_() for piece in step.x]
    penalty(twin, x, step.dy, "curved", add_loss)
    for rank, result in enumerate(results):
        if result is not None:
            close(result, x[rank].grad, 1e-9, f"second derivative, rank {rank}")


def summed_over_ranks(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.full((3,), rank + 1.0, dtype=torch.float64, requires_grad=True)
    values = x * 1  # what a graph may need once more
    total = double_backward.total(values, dist.group.WORLD, "here")
    return values.detach(), total.detach(), torch.autograd.grad(total.sum() + values.square().sum(), x)[0]


def test_what_is_summed_over_ranks_stays_what_it_was(ranks: Ranks) -> None:
    for rank, (values, total, gradient) in enumerate(ranks.run(summed_over_ranks, world_size=2)):
        assert values.tolist() == [rank + 1.0] * 3
        assert total.tolist() == [3.0] * 3
        assert gradient.tolist() == [2 + 2 * (rank + 1.0)] * 3  # the sum of both ranks' losses, and its own square's
