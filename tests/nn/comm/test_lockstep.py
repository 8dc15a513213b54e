"""Ranks that need different gradients still send the same messages: nobody waits for one that never comes."""

from copy import deepcopy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.nn.autograd import measure
from syncbn.nn.kernels import dispatch
from syncbn.testing import force_exchange
from tests.nn.support.oracle import CHANNELS, SPATIAL, Step, check, close, make_steps, named, on_a_rank, one_process
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Messages, Ranks, messages

SUMS, GRADIENT_SUMS = [2 * CHANNELS + 2], [2 * CHANNELS]


def shapes(sent: Messages) -> list[list[int]]:
    return [shape for _, shape, _ in sent.payloads]


FROZEN = {"affine=False": [], "frozen": ["weight", "bias"], "weight_frozen": ["weight"], "bias_frozen": ["bias"]}


def a_layer(frozen: str) -> nn.Module:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, affine=frozen != "affine=False", dtype=torch.float64))
    for name in FROZEN[frozen]:
        getattr(layer, name).requires_grad_(False)
    return layer


def with_or_without(
    rank: int, world_size: int, layer: nn.Module, step: Step, needs: list[bool], masked: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Messages]:
    x = step.x[rank].detach().requires_grad_(needs[rank])
    y = layer(x, torch.tensor(True) if masked else None)
    assert y.requires_grad == (any(needs) or any(p is not None and p.requires_grad for p in (layer.weight, layer.bias)))
    with messages() as sent:
        if y.requires_grad:
            y.backward(step.dy[rank])
    gradients = [None if parameter is None else parameter.grad for parameter in (layer.weight, layer.bias)]
    return x.grad, *gradients, sent


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize(
    ("cut", "needs"),
    [
        ([3, 5], [False, True]),
        ([3, 5], [True, False]),
        ([0, 8], [False, True]),
        ([0, 8], [True, False]),
        ([3, 5], [False, False]),
        ([3, 3, 2], [False, True, False]),
    ],
    ids=str,
)
def test_a_rank_whose_input_needs_no_gradient_serves_the_others(
    ranks: Ranks, cut: list[int], needs: list[bool], frozen: str, masked: bool
) -> None:
    layer = a_layer(frozen)
    (step,) = steps = make_steps(cut, SPATIAL["4d"])
    expected = one_process(layer, steps)
    results = ranks.run(with_or_without, layer, step, needs, masked, world_size=len(cut), timeout=20)
    for rank, (dx, _, _, sent) in enumerate(results):
        assert shapes(sent) == ([GRADIENT_SUMS] if any(needs) else [])  # gradients of parameters are each rank's own
        if needs[rank]:
            close(dx, expected.dx[0][rank], 1e-10, f"dx, rank {rank}")
        else:
            assert dx is None
    for name, index in (("weight", 1), ("bias", 2)):
        shares = [result[index] for result in results]
        if frozen == "affine=False" or name in FROZEN[frozen]:
            assert shares == [None] * len(cut)
        else:
            close(sum(shares), getattr(expected, {"weight": "dgamma", "bias": "dbeta"}[name]), 1e-10, name)


class Functional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return syncbn.sync_batch_norm(x, None, None, training=True, mask=mask)

    weight = bias = None


def test_the_function_without_parameters_serves_the_others_too(ranks: Ranks) -> None:
    (step,) = steps = make_steps([3, 5], SPATIAL["4d"])
    expected = one_process(nn.BatchNorm2d(CHANNELS, affine=False), steps)
    needs = [False, True]
    results = ranks.run(with_or_without, Functional(), step, needs, False, world_size=2, timeout=20)
    assert results[0][0] is None
    close(results[1][0], expected.dx[0][1], 1e-10, "dx")


def a_frozen_stem(rank: int, world_size: int, net: nn.Module, step: Step) -> tuple[Tensor | None, list[Messages]]:
    x = step.x[rank].detach().requires_grad_(rank > 0)
    with messages() as forward:
        y = net(x)
    with messages() as backward:
        y.backward(step.dy[rank])
    return x.grad, [forward, backward]


def test_frozen_layers_one_after_the_other_stay_in_step(ranks: Ranks) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.Tanh(), nn.BatchNorm2d(CHANNELS)).double()

    mine = syncbn.convert(parameters(net())).requires_grad_(False)
    (step,) = make_steps([3, 5], SPATIAL["4d"])
    results = ranks.run(a_frozen_stem, mine, step, world_size=2, timeout=20)
    whole = torch.cat(step.x).requires_grad_()
    twin = net()
    twin.load_state_dict(mine.state_dict())
    twin(whole).backward(torch.cat(step.dy))
    close(results[1][0], whole.grad[3:], 1e-10, "dx")
    for _, (forward, backward) in results:
        assert shapes(forward) == [SUMS] * 2
        assert shapes(backward) == [GRADIENT_SUMS] * 2


def without_gradients(rank: int, world_size: int, layer: nn.Module, steps: list[Step]) -> tuple:
    x = steps[0].x[rank].requires_grad_()
    with messages() as sent, torch.no_grad():
        y = layer(x)
    assert not y.requires_grad
    return y, layer.running_mean, layer.running_var, layer.num_batches_tracked, sent


@pytest.mark.parametrize("frozen", FROZEN)
def test_training_under_no_grad_sends_one_message_and_learns(ranks: Ranks, frozen: str) -> None:
    layer = a_layer(frozen)
    steps = make_steps([3, 5], SPATIAL["4d"])
    expected = one_process(layer, steps)
    for rank, (y, mean, var, tracked, sent) in enumerate(ranks.run(without_gradients, layer, steps, world_size=2)):
        assert shapes(sent) == [SUMS]
        close(y, expected.y[0][rank], 1e-10, "y")
        close(mean, expected.running_mean, 1e-10, "running_mean")
        close(var, expected.running_var, 1e-10, "running_var")
        assert tracked == 1


def no_gradient_on_rank_0(rank: int, world_size: int, layer: nn.Module, steps: list[Step]) -> list[Messages]:
    with torch.set_grad_enabled(rank > 0), messages() as sent:
        layer(steps[0].x[rank])
    return [sent]


def test_one_rank_alone_under_no_grad_sends_the_same_forward(ranks: Ranks) -> None:
    steps = make_steps([3, 5], SPATIAL["4d"])
    for (sent,) in ranks.run(no_gradient_on_rank_0, a_layer("frozen"), steps, world_size=2, timeout=20):
        assert shapes(sent) == [SUMS]


def in_ddp(
    rank: int, world_size: int, layer: nn.Module, steps: list[Step], how: str, options: dict
) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """All ``steps`` forward and backward, then the sums over ranks of the parameters' gradients."""
    wrapped = DistributedDataParallel(layer, **options)
    x = [step.x[rank].detach().requires_grad_() for step in steps]
    if how == "one_backward":
        y = [wrapped(piece) for piece in x]
        sum((out * step.dy[rank]).sum() for out, step in zip(y, steps, strict=True)).backward()
    else:
        y = []
        for piece, step in zip(x[:-1], steps[:-1], strict=True):
            with wrapped.no_sync():
                y.append(wrapped(piece))
                y[-1].backward(step.dy[rank])
        y.append(wrapped(x[-1]))
        y[-1].backward(steps[-1].dy[rank])
    gradients = {name: parameter.grad * world_size for name, parameter in layer.named_parameters()}
    return [out.detach() for out in y], [piece.grad for piece in x], gradients, dict(layer.named_buffers())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=["default", "bucket_view"])
@pytest.mark.parametrize("how", ["one_backward", "no_sync"])
@pytest.mark.parametrize("cut", [[8], [3, 5], [3, 3, 2]], ids=named)
def test_several_forwards_for_one_update_under_ddp_equal_one_process(
    ranks: Ranks, cut: list[int], how: str, options: dict, momentum: float | None
) -> None:
    # DDP broadcasts the buffers in place before each forward: nothing that backward needs may be one of them.
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64))
    steps = make_steps(cut, SPATIAL["4d"], count=3 if how == "no_sync" else 2)
    expected = one_process(deepcopy(layer), steps)
    for rank, (y, dx, gradients, buffers) in enumerate(
        ranks.run(in_ddp, layer, steps, how, options, world_size=len(cut), timeout=30)
    ):
        for number in range(len(steps)):
            close(y[number], expected.y[number][rank], 1e-10, f"y {number}, rank {rank}")
            close(dx[number], expected.dx[number][rank], 1e-10, f"dx {number}, rank {rank}")
        close(gradients["weight"], expected.dgamma, 1e-10, "dgamma")
        close(gradients["bias"], expected.dbeta, 1e-10, "dbeta")
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            close(buffers[name], getattr(expected, name), 1e-10, name)


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("cut", [[8], [3, 5], [0, 8], [3, 3, 2]], ids=named)
def test_the_biased_running_variance_is_divided_by_n(ranks: Ranks, cut: list[int], momentum: float | None) -> None:
    options = {"momentum": momentum, "dtype": torch.float64}
    layer = syncbn.SyncBatchNorm2d(CHANNELS, biased_running_var=True, **options)
    steps = make_steps(cut, SPATIAL["4d"], count=3)
    expected = one_process(syncbn.SyncBatchNorm2d(CHANNELS, **options), steps)
    var = torch.ones(CHANNELS, dtype=torch.float64)
    for number, step in enumerate(steps):
        share = 1 / (number + 1) if momentum is None else momentum
        var = (1 - share) * var + share * torch.cat(step.x).transpose(0, 1).flatten(1).var(1, correction=0)
    outcomes = ranks.run(on_a_rank, layer, steps, world_size=len(cut))
    check(outcomes, expected._replace(running_var=var), 1e-10)


def biased_function(rank: int, world_size: int, step: Step) -> tuple[Tensor, Tensor]:
    mean, var = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)
    with force_exchange():
        syncbn.sync_batch_norm(step.x[rank], mean, var, training=True, momentum=1.0, biased_running_var=True)
    return mean, var


@pytest.mark.parametrize("cut", [[8], [3, 5]], ids=named)
def test_the_functions_biased_running_variance_is_divided_by_n(ranks: Ranks, cut: list[int]) -> None:
    (step,) = make_steps(cut, SPATIAL["4d"])
    values = torch.cat(step.x).transpose(0, 1).flatten(1)
    for mean, var in ranks.run(biased_function, step, world_size=len(cut)):
        close(mean, values.mean(1), 1e-10, "running_mean")
        close(var, values.var(1, correction=0), 1e-10, "running_var")


def test_the_biased_running_variance_of_a_lone_process_is_divided_by_n() -> None:
    layer = syncbn.SyncBatchNorm1d(CHANNELS, momentum=1.0, biased_running_var=True)
    x = torch.randn(5, CHANNELS)
    layer(x)
    close(layer.running_var, x.var(0, correction=0), 1e-6, "running_var")
    close(layer(x), nn.BatchNorm1d(CHANNELS)(x), 1e-5, "y")


class Frozen(NamedTuple):
    """What a network of three layers, of which none, or the last, needs a gradient, cost on one rank."""

    kept: int  # bytes for the backward pass
    forward: Messages
    backward: Messages
    needs: bool


def a_backbone(trains: str) -> nn.Module:
    body = nn.Sequential(
        *[m for _ in range(2) for m in (nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU())]
    )
    body.requires_grad_(False)
    if trains == "last":
        body[4].requires_grad_(True)
    return body.double()


def through_a_backbone(rank: int, world_size: int, net: nn.Module, step: Step, how: str) -> Frozen:
    kept = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal kept
        kept += t.numel() * t.element_size()
        return t

    with force_exchange(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), messages() as forward:
        y = checkpoint(net, step.x[rank], use_reentrant=False) if how == "checkpointed" else net(step.x[rank])
    with messages() as backward, force_exchange():
        if y.requires_grad:
            y.backward(step.dy[rank])
    if not y.requires_grad:
        y.numpy()
    return Frozen(kept, forward, backward, y.requires_grad)


@pytest.mark.parametrize("how", ["plain", "checkpointed"])
@pytest.mark.parametrize("trains", ["nothing", "last"])
@pytest.mark.parametrize("cut", [[8], [3, 5], [0, 8]], ids=named)
def test_a_frozen_backbone_costs_what_torchs_does(ranks: Ranks, cut: list[int], trains: str, how: str) -> None:
    (step,) = make_steps(cut, SPATIAL["4d"])
    for rank, cost in enumerate(
        ranks.run(through_a_backbone, syncbn.convert(a_backbone(trains)), step, how, world_size=len(cut))
    ):
        assert cost.needs == (trains == "last")
        assert shapes(cost.forward) == [SUMS] * 2
        # Nobody's input needs a gradient; what is checkpointed is computed again, and that sends its sums.
        again = how == "checkpointed" and trains == "last"
        assert shapes(cost.backward) == ([SUMS] * 2 if again else [])
        if how == "plain" and len(step.x[rank]):
            torchs = through_a_backbone(rank, 1, a_backbone(trains), step, how)
            assert cost.kept <= torchs.kept + (8 * (CHANNELS + 1) if trains == "last" else 0)  # a mean's rest, and n


def under_no_grad(rank: int, world_size: int, layer: nn.Module, steps: list[Step]) -> str:
    with torch.set_grad_enabled(rank > 0), pytest.raises(RuntimeError) as caught:
        layer(steps[0].x[rank].requires_grad_())
    return str(caught.value)


def test_a_rank_under_no_grad_while_another_needs_a_gradient_is_told_on_every_rank(ranks: Ranks) -> None:
    # The others would wait for its backward message.
    steps = make_steps([3, 2, 3], SPATIAL["4d"])
    told = "1 of 3 ranks run it under torch.no_grad(), but its input needs a gradient on 2"
    for message in ranks.run(under_no_grad, a_layer("frozen"), steps, world_size=3, timeout=20):
        assert message.startswith("layer SyncBatchNorm2d(3): ")
        assert told in message
        assert "\n" not in message


def differentiated_once_more(rank: int, world_size: int, layer: nn.Module, step: Step, masked: bool) -> tuple:
    """The gradient of the squared norm of the parameters' gradients, in something after the layer."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    mask = torch.ones(len(step.x[rank]), 1, 1, dtype=torch.bool) if masked else None
    with force_exchange(), messages() as sent:
        y = layer(step.x[rank], mask) if masked else layer(step.x[rank])
        first = torch.autograd.grad((y * scale * step.dy[rank]).sum(), list(layer.parameters()), create_graph=True)
    return [t.detach() for t in first], torch.autograd.grad(first[0].sum() + first[1].sum(), scale)[0], shapes(sent)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("cut", [[8], [3, 5]], ids=named)
def test_a_second_derivative_where_no_input_needs_one_sends_nothing(ranks: Ranks, cut: list[int], masked: bool) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    (step,) = make_steps(cut, SPATIAL["4d"])
    whole = Step([torch.cat(step.x)], [torch.cat(step.dy)])
    twin = nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    expected, second, _ = differentiated_once_more(0, 1, twin, whole, False)
    results = ranks.run(differentiated_once_more, layer, step, masked, world_size=len(cut))
    for index in (0, 1):
        close(sum(first[index] for first, _, _ in results), expected[index], 1e-10, "first")
    close(sum(again for _, again, _ in results), second, 1e-10, "second")
    assert [sent for *_, sent in results] == [[SUMS]] * len(cut)


def as_on_a_gpu(rank: int, world_size: int, layer: nn.Module, step: Step, needs: list[bool | None], how: str) -> str:
    """There a message has the need only where parameters are frozen, and a CUDA graph cannot read it. None: no_grad."""
    need = needs[rank]
    x = step.x[rank].requires_grad_(need is True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "carries_need", lambda x: False)
        if how == "graph":
            patch.setattr(measure, "_reads_need", lambda x, shares: False)
        syncbn.debug(how != "eager")
        try:
            with messages() as sent, torch.set_grad_enabled(need is not None):
                y = layer(x)
                if y.requires_grad:
                    y.backward(step.dy[rank])
        except RuntimeError as error:
            return str(error)
        finally:
            syncbn.debug(False)
    return str(shapes(sent))


@pytest.mark.parametrize(
    ("frozen", "needs", "how", "says"),
    [
        ("frozen", [True, True], "eager", [str([[8], [6]])] * 2),
        ("frozen", [False, False], "eager", [str([[8]])] * 2),
        ("frozen", [False, True], "eager", [str([[8], [6]])] * 2),
        ("frozen", [False, None], "eager", [str([[8]])] * 2),
        ("frozen", [False, True], "debug", [str([[8], [6]])] * 2),
        ("frozen", [None, True], "debug", ["1 of 2 ranks run it under torch.no_grad()"] * 2),
        ("bias_frozen", [False, False], "eager", [str([[7], [6]])] * 2),
        ("bias_frozen", [False, True], "eager", [str([[7], [6]])] * 2),
        ("frozen", [True, True], "graph", [str([[8], [6]])] * 2),
        ("frozen", [False, False], "graph", [str([[8]])] * 2),
        ("frozen", [False, True], "graph", ["rank 1 is at", "rank 0 is at"]),
    ],
)
def test_on_a_gpu_ranks_that_need_no_gradient_read_whether_another_does(
    ranks: Ranks, frozen: str, needs: list[bool | None], how: str, says: list[str]
) -> None:
    # Parameters are alike on all ranks. In a graph with frozen ones inputs must be alike too; debug mode says so.
    (step,) = make_steps([3, 5], SPATIAL["4d"])
    for said, expected in zip(
        ranks.run(as_on_a_gpu, a_layer(frozen), step, needs, how, world_size=2, fresh=True), says, strict=True
    ):
        assert expected in said
        assert "rank " not in expected or "with no backward message to come" in said
