"""torch.func's transforms and forward-mode differentiation: on ranks, what one process gives in float64."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.autograd.functional as autograd
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import syncbn
from syncbn.nn import tracing
from tests.nn.support.oracle import close
from tests.support.ranks import Ranks

Tensors = dict[str, Tensor]
# torch's own, when it first needs forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class ByHand(nn.BatchNorm1d):
    """Batch norm out of pieces: torch's own gives an asymmetric second derivative of itself by jvp, then backward."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, 0, correction=0)
        y = (x - mean) * (var + self.eps).rsqrt()
        return y if self.weight is None else y * self.weight + self.bias


class Own(nn.BatchNorm1d):
    """Has a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


OPTIONS: dict[str, dict[str, Any]] = {
    "untracked": {"track_running_stats": False},
    "tracked": {},
    "cumulative": {"momentum": None},
    "plain": {"affine": False},
}


def a_net(options: str, kind: type[nn.BatchNorm1d] = nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), kind(4, **OPTIONS[options]), nn.Tanh(), nn.Linear(4, 2)).double()


def direction(params: Tensors) -> Tensors:
    return {name: torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p) for name, p in params.items()}


def flat(derivative: Any) -> list[Tensor]:
    if isinstance(derivative, Tensor):
        return [derivative.detach()]
    return [t for value in derivative.values() for t in flat(value)]


def by_forward_mode(loss: Callable[[Tensors], Tensor], params: Tensors) -> Tensor:
    with fwd.dual_level():
        duals = {
            name: fwd.make_dual(p, t) for (name, p), t in zip(params.items(), direction(params).values(), strict=True)
        }
        return fwd.unpack_dual(loss(duals)).tangent


def forward_over_backward(loss: Callable[[Tensors], Tensor], params: Tensors) -> Tensors:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    with fwd.dual_level():
        duals = {
            name: fwd.make_dual(p, t) for (name, p), t in zip(leaves.items(), direction(params).values(), strict=True)
        }
        found = torch.autograd.grad(loss(duals), list(leaves.values()))
        return {name: fwd.unpack_dual(g).tangent for name, g in zip(leaves, found, strict=True)}


def backward_of_jvp(loss: Callable[[Tensors], Tensor], params: Tensors) -> Tensors:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    jvp(loss, (leaves,), (direction(params),))[1].backward()
    return {name: p.grad for name, p in leaves.items()}


def of_vjp(loss: Callable[[Tensors], Tensor], params: Tensors) -> Tensors:
    value, back = vjp(loss, params)
    return back(torch.ones_like(value))[0]


# Each is a sum over ranks, as the loss is.
DERIVATIVES: dict[str, Callable[[Callable[[Tensors], Tensor], Tensors], Any]] = {
    "grad": lambda loss, params: grad(loss)(params),
    "vjp": of_vjp,
    "jvp": lambda loss, params: jvp(loss, (params,), (direction(params),))[1],
    "jacrev": lambda loss, params: jacrev(loss)(params),
    "jacfwd": lambda loss, params: jacfwd(loss)(params),
    "hessian": lambda loss, params: hessian(loss)(params),
    "hessian vector product": lambda loss, params: jvp(grad(loss), (params,), (direction(params),))[1],
    "backward of jvp": backward_of_jvp,
    "forward mode": by_forward_mode,
    "forward over backward": forward_over_backward,
}


def derivative(what: str, net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    params = {name: p.detach() for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}

    def loss(params: Tensors) -> Tensor:
        return functional_call(net, (params, buffers), (x,)).pow(3).sum()

    return flat(DERIVATIVES[what](loss, params)), list(buffers.values())


def data() -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def on_a_rank(rank: int, world_size: int, options: str, cut: list[int], own: bool) -> dict:
    net = syncbn.convert(a_net(options, Own if own else nn.BatchNorm1d))
    return {what: derivative(what, net, data().split(cut)[rank]) for what in DERIVATIVES}


@pytest.mark.parametrize(
    ("options", "own"),
    [("untracked", False), ("tracked", False), ("cumulative", False), ("plain", False), ("untracked", True)],
)
@pytest.mark.parametrize("cut", [[8], [4, 4], [2, 6], [0, 8]], ids=str)
def test_every_derivative_is_that_of_one_process(ranks: Ranks, cut: list[int], options: str, own: bool) -> None:
    if len(cut) == 1:
        results = [on_a_rank(0, 1, options, cut, own)]  # without a process group
    else:
        results = ranks.run(on_a_rank, options, cut, own, world_size=len(cut))
    one = a_net(options)
    one(data())
    for what in DERIVATIVES:
        expected, _ = derivative(what, a_net(options, ByHand), data())
        shares = [result[what][0] for result in results]
        for index, value in enumerate(expected):
            close(sum(share[index] for share in shares), value, 1e-9, what)
        for result in results:  # captured buffers move once, and alike
            for buffer, after, first in zip(result[what][1], one.buffers(), results[0][what][1], strict=True):
                close(buffer, after, 1e-12, what)
                assert torch.equal(buffer, first)


def a_function(x: Tensor, residual: Tensor, mask: Tensor | None, one: bool) -> Tensor:
    """Everything that the layer does, differentiable in the input and the residual."""
    if not one:
        y = syncbn.sync_batch_norm(x, None, None, training=True, mask=mask, act="relu", residual=residual)
        return (y.tanh() * 2).sum()
    rows = x if mask is None else x[mask]
    y = F.relu(F.batch_norm(rows, None, None, training=True) + (residual if mask is None else residual[mask]))
    return (y.tanh() * 2).sum()


def with_extras(rank: int, world_size: int, cut: list[int], masked: bool) -> list[Tensor]:
    x, residual = (t.split(cut)[rank] for t in (data(), data().cos()))
    mask = (torch.arange(8) % 3 > 0).split(cut)[rank] if masked else None
    return list(grad(lambda x, residual: a_function(x, residual, mask, False), argnums=(0, 1))(x, residual))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("cut", [[3, 5], [0, 8]], ids=str)
def test_a_mask_a_residual_and_an_activation_are_differentiated_too(ranks: Ranks, cut: list[int], masked: bool) -> None:
    mask = torch.arange(8) % 3 > 0 if masked else None
    expected = grad(lambda x, residual: a_function(x, residual, mask, True), argnums=(0, 1))(data(), data().cos())
    results = ranks.run(with_extras, cut, masked, world_size=2)
    for index in (0, 1):
        close(torch.cat([result[index] for result in results]), expected[index], 1e-10, str(index))


def ghosts(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return grad(lambda x: layer(x).pow(3).sum())(x), layer.running_mean


def test_ghost_batches_are_differentiated_too() -> None:
    layer = syncbn.SyncBatchNorm1d(3, ghost_batch=4, dtype=torch.float64)
    found, mean = ghosts(layer, data())
    chunks = [ghosts(ByHand(3, dtype=torch.float64), chunk)[0] for chunk in data().split(4)]
    close(found, torch.cat(chunks), 1e-10, "dx")
    close(mean, 0.1 * data().mean(0), 1e-12, "running_mean")


def several(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of batches, an ensemble with its buffers, and the gradient for each of several batches."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}

    def loss(params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
        return functional_call(net, (params, buffers), (x,)).pow(3).sum()

    both = torch.stack([x, 2 * x.cos()])
    stacked = {name: torch.stack([b, b + 1]) for name, b in buffers.items()}
    doubled = {name: torch.stack([p, 1.5 * p]) for name, p in params.items()}
    ensemble = vmap(loss, (0, 0, None))(doubled, stacked, x)
    untracked = {**stacked} or buffers
    each = vmap(loss, (None, 0 if stacked else None, 0))(params, untracked, both)
    mean = stacked.get("1.running_mean", torch.zeros(()))
    return ensemble, each, mean


def several_on_a_rank(rank: int, world_size: int, options: str, cut: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return several(syncbn.convert(a_net(options)), data().split(cut)[rank])


@pytest.mark.parametrize("options", ["untracked", "tracked"])
@pytest.mark.parametrize("cut", [[4, 4], [2, 6]], ids=str)
def test_vmap_over_batches_and_ensembles(ranks: Ranks, cut: list[int], options: str) -> None:
    ensemble, each, mean = several(a_net(options), data())
    results = ranks.run(several_on_a_rank, options, cut, world_size=2)
    close(sum(result[0] for result in results), ensemble, 1e-9, "ensemble")
    close(sum(result[1] for result in results), each, 1e-9, "each")
    for result in results:
        close(result[2], mean, 1e-12, "running_mean")


def what_is_refused(rank: int, world_size: int) -> dict[str, str]:
    layer, untracked = syncbn.SyncBatchNorm1d(3), syncbn.SyncBatchNorm1d(3, track_running_stats=False)
    own = syncbn.convert(nn.Sequential(Own(3)))
    x = torch.randn(4, 3)
    several = torch.eye(12).view(12, 4, 3)

    def batched() -> None:
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(layer(leaf), leaf, several, is_grads_batched=True)

    def vectorized(derivative: Callable[..., Any], **how: Any) -> Callable[[], Any]:
        return lambda: derivative(lambda x: untracked(x).square().sum(0), x, vectorize=True, **how)

    def batched_twice() -> None:
        autograd.hessian(lambda x: untracked(x).pow(3).sum(), x, vectorize=True)

    said = {}
    for name, how in {
        "shared": lambda: vmap(layer)(torch.stack([x, x])),
        "shared alone": lambda: vmap(syncbn.SyncBatchNorm1d(3, group=1))(torch.stack([x, x])),
        "uneven": lambda: vmap(untracked)(torch.stack([x] * (rank + 2))),
        "linearize": lambda: linearize(untracked, x),
        "own": lambda: grad(lambda x: own(x).sum())(x),
        "one value": lambda: grad(lambda x: layer(x[rank:1]).sum())(x),
        "batched gradients": batched,
        "vectorized": vectorized(autograd.jacobian),
        "vectorized forward": vectorized(autograd.jacobian, strategy="forward-mode"),
        "vectorized twice": batched_twice,
    }.items():
        with pytest.raises((RuntimeError, ValueError)) as caught:
            how()
        said[name] = str(caught.value)
    return said


def test_what_cannot_be_done_is_refused_in_one_line_that_names_the_layer(ranks: Ranks) -> None:
    for rank, said in enumerate(ranks.run(what_is_refused, world_size=2, timeout=30)):
        expected = {
            "shared": "layer SyncBatchNorm1d(3): vmap runs several batches at once, and they share running statistics",
            "shared alone": "layer SyncBatchNorm1d(3): vmap runs several batches at once",
            "uneven": f"vmap runs {rank + 2} at once here and another number on other ranks",
            "linearize": "torch.func.linearize cannot trace an all-reduce; use torch.func.jvp",
            "own": "layer 0: its own forward pass changes buffers that torch.func did not get",
            "one value": "Expected more than 1 value per channel when training, got 1 on the 2 ranks together",
            "batched gradients": "layer SyncBatchNorm1d(3): is_grads_batched=True",
            "vectorized": "is_grads_batched=True (vectorize=True) cannot all-reduce its batch; use torch.func.jacrev",
            "vectorized forward": "is_grads_batched=True (vectorize=True) cannot all-reduce",
            "vectorized twice": "is_grads_batched=True (vectorize=True) cannot all-reduce",
        }
        for name, text in expected.items():
            assert text in said[name], name
            assert "\n" not in said[name], name


def test_batched_gradients_are_right_where_nothing_is_sent() -> None:
    layer, x = syncbn.SyncBatchNorm1d(3, ghost_batch=4, dtype=torch.float64), data().requires_grad_()
    several = torch.eye(24, dtype=torch.float64).view(24, 8, 3)
    (found,) = torch.autograd.grad(layer(x), x, several, is_grads_batched=True)
    expected = [torch.autograd.grad(deepcopy(layer)(x), x, each)[0] for each in several]
    close(found, torch.stack(expected), 1e-10, "dx")


def adapted(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """A gradient, and outputs for two batches at once; by transforms and without."""
    layer, x = syncbn.SyncBatchNorm1d(3, dtype=torch.float64).eval(), data().chunk(2)[rank]
    with syncbn.adapt(layer, prior=3), torch.no_grad():
        found = torch.cat([grad(lambda x: layer(x).pow(3).sum())(x), *vmap(layer)(torch.stack([x, x.cos()]))])
        outputs = layer(x), layer(x.cos())
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            layer(leaf).pow(3).sum().backward()
    return found, torch.cat([leaf.grad, *outputs])


def test_adapted_layers_are_differentiated_too(ranks: Ranks) -> None:
    for found, expected in ranks.run(adapted, world_size=2):
        close(found, expected, 1e-12, "dx")


def test_transforms_are_told_from_plain_autograd() -> None:
    # By attributes that are private to torch.
    asked: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        asked.append(tracing.transformed())
        return x.sum()

    ask(torch.ones(2, requires_grad=True)).backward()
    grad(ask)(torch.ones(2))
    vmap(ask)(torch.ones(2, 2))
    with fwd.dual_level():
        ask(torch.ones(2))
    ask(torch.ones(2))
    assert asked == [False, True, True, True, False]


def test_batched_gradients_are_told_from_others() -> None:
    # By an attribute that is private to torch.
    asked: list[bool] = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            asked.append(tracing.batched_by_autograd(dy))
            return dy

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Asks.apply(x), x, torch.ones(2))
    torch.autograd.grad(Asks.apply(x), x, torch.ones(3, 2), is_grads_batched=True)
    assert asked == [False, True]
