"""``act`` and ``residual``: relu(batch norm(x) + residual) of one process in float64, by every road of the CPU."""

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.testing import force_exchange, without_native
from tests.nn.kernels.test_saved_memory import what_is_saved
from tests.nn.support.oracle import CHANNELS, close
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Ranks, messages

ROUTES: dict[str, Callable[[], AbstractContextManager[None]]] = {"compiled": nullcontext, "torchs": without_native}
ADDED = {"relu": ("relu", False), "residual": (None, True), "residual, relu": ("relu", True)}
CUTS = [[8], [2, 6], [0, 8]]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}
by_each_route = pytest.mark.parametrize("route", ROUTES)
with_each = pytest.mark.parametrize("added", ADDED)


class Piece(NamedTuple):
    """What one rank gets."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    mask: Tensor | None


def pieces(
    cut: list[int], residual: bool, *, masked: bool = False, dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format, residual_dtype: torch.dtype | None = None,
) -> list[Piece]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    found = []
    for rank, samples in enumerate(cut):
        x, r, dy = (torch.randn(samples, CHANNELS, 4, 3, generator=generator) for _ in range(3))
        mask = torch.rand(samples, 4, 3, generator=generator) < 0.7
        x, dy = ((t + shift).to(dtype).contiguous(memory_format=layout) for t, shift in ((x, rank + 1.0), (dy, 0.0)))
        found.append(Piece(x, r.to(residual_dtype or dtype) if residual else None, dy, mask if masked else None))
    return found


def leaves(piece: Piece) -> tuple[Tensor, Tensor | None]:
    """Input and residual, to be differentiated by."""
    x, residual = piece.x.detach().requires_grad_(), piece.residual
    return x, None if residual is None else residual.detach().requires_grad_()


def outcome(layer: nn.Module, piece: Piece, act: str | None) -> dict[str, Tensor]:
    x, residual = leaves(piece)
    y = layer(x, piece.mask, residual=residual, act=act)
    y.backward(piece.dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad, "residual": None if residual is None else residual.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return {name: value for name, value in found.items() if value is not None}


def on_a_rank(
    rank: int, world_size: int, layer: nn.Module, given: list[Piece], act: str | None, route: str
) -> dict[str, Tensor]:
    with force_exchange(), ROUTES[route]():
        return outcome(layer, given[rank], act)


class OneProcess(nn.Module):
    """Torch's own operations in float64 on the values that count, a pixel a sample; a ghost batch by itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.twin = nn.BatchNorm1d(CHANNELS, layer.eps, layer.momentum, dtype=torch.float64)
        self.twin.load_state_dict(layer.state_dict())
        self.ghost_batch = layer.ghost_batch

    def forward(self, x: Tensor, mask: Tensor | None, *, residual: Tensor | None, act: str | None) -> Tensor:
        if mask is None:
            mask = torch.ones(len(x), *x.shape[2:], dtype=torch.bool)
        chunk = self.ghost_batch or len(x)
        y = torch.cat([self.normalized(*both) for both in zip(x.split(chunk), mask.split(chunk), strict=True)])
        y = y if residual is None else y + residual
        y = y if act is None else F.relu(y)
        return torch.where(mask.unsqueeze(1), y, 0)

    def normalized(self, x: Tensor, mask: Tensor) -> Tensor:
        twin = self.twin
        if self.ghost_batch is None:
            rows = twin(x.movedim(1, -1)[mask])
        else:  # their running statistics are test_ghost.py's business
            rows = F.batch_norm(x.movedim(1, -1)[mask], None, None, twin.weight, twin.bias, True, eps=twin.eps)
        return torch.zeros_like(x).movedim(1, -1).masked_scatter(mask.unsqueeze(-1), rows).movedim(-1, 1)


def whole(given: list[Piece]) -> Piece:
    """All ranks' pieces as one, in float64."""
    x, residual, dy, mask = (None if parts[0] is None else torch.cat(parts) for parts in zip(*given, strict=True))
    return Piece(x.double(), None if residual is None else residual.double(), dy.double(), mask)


def check(layer: nn.Module, given: list[Piece], results: list[dict[str, Tensor]], act: str | None) -> None:
    expected = outcome(OneProcess(layer), whole(given), act)
    expected = {name.removeprefix("twin."): value for name, value in expected.items()}
    types = [t.dtype for t in given[0][:2] if t is not None]
    tolerance = max(TOLERANCE[dtype] for dtype in types)
    for name, value in expected.items():
        got = [result[name] for result in results]
        if name in ("y", "x", "residual"):
            close(torch.cat(got), value, tolerance, name)
        elif name in ("weight", "bias"):
            close(sum(got), value, 3 * tolerance, name)
        elif layer.ghost_batch is None:
            assert all(torch.equal(one, got[0]) for one in got), f"{name} differs between ranks"
            close(got[0], value, 2e-5, name)
    for piece, result in zip(given, results, strict=True):
        assert result["y"].dtype == torch.promote_types(types[0], types[-1])
        assert result["x"].dtype == types[0]
        assert piece.residual is None or result["residual"].dtype == piece.residual.dtype
        form = torch.contiguous_format if piece.x.is_contiguous() else torch.channels_last
        for name in ("y", "x") if len(piece.x) else ():
            assert result[name].is_contiguous(memory_format=form), f"{name} lies otherwise than the input"
        if piece.mask is not None:
            for name in {"y", "x", "residual"} & result.keys():
                assert not result[name].movedim(1, -1)[~piece.mask].any(), f"{name}, where masked"


def compare(
    ranks: Ranks, layer: nn.Module, given: list[Piece], act: str | None, route: str = "compiled"
) -> list[dict[str, Tensor]]:
    results = ranks.run(on_a_rank, layer, given, act, route, world_size=len(given))
    check(layer, given, results, act)
    return results


@by_each_route
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@with_each
def test_it_equals_one_process(
    ranks: Ranks, added: str, cut: list[int], form: torch.memory_format, masked: bool, route: str
) -> None:
    act, residual = ADDED[added]
    given = pieces(cut, residual, masked=masked, layout=form)
    compare(ranks, parameters(syncbn.SyncBatchNorm2d(CHANNELS)), given, act, route)


@pytest.mark.parametrize(
    "types",
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@by_each_route
def test_of_every_type(ranks: Ranks, types: tuple[torch.dtype, torch.dtype], masked: bool, route: str) -> None:
    given = pieces([3, 5], True, masked=masked, dtype=types[0], residual_dtype=types[1])
    parameter_type = torch.promote_types(types[0], torch.float32)
    compare(ranks, parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=parameter_type)), given, "relu", route)


@by_each_route
def test_under_autocast(ranks: Ranks, route: str) -> None:
    layer, given = parameters(syncbn.SyncBatchNorm2d(CHANNELS)), pieces([8], True)
    (plain,) = ranks.run(on_a_rank, layer, given, "relu", route, world_size=1)
    with torch.autocast("cpu", torch.bfloat16):  # touches convolutions and products, and nothing in here
        (same,) = ranks.run(on_a_rank, layer, given, "relu", route, world_size=1)
    for name, value in plain.items():
        assert torch.equal(same[name], value), name


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@with_each
def test_ghost_batches(ranks: Ranks, added: str, masked: bool) -> None:
    act, residual = ADDED[added]
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=2))
    compare(ranks, layer, pieces([6], residual, masked=masked), act)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@with_each
def test_without_a_group(added: str, masked: bool) -> None:
    act, residual = ADDED[added]
    layer, given = parameters(syncbn.SyncBatchNorm2d(CHANNELS)), pieces([8], residual, masked=masked)
    check(layer, given, [outcome(copy.deepcopy(layer), given[0], act)], act)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@with_each
def test_in_evaluation(added: str, masked: bool) -> None:
    act, residual = ADDED[added]
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS))
    (piece,) = pieces([8], residual, masked=masked)
    layer(piece.x)
    layer.eval()
    expected = F.batch_norm(piece.x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    expected = expected if piece.residual is None else expected + piece.residual
    expected = expected if act is None else F.relu(expected)
    if piece.mask is not None:
        expected = expected.masked_fill(~piece.mask.unsqueeze(1), 0)
    close(layer(piece.x, piece.mask, residual=piece.residual, act=act), expected, 1e-6, "y")


@by_each_route
def test_of_the_layer_or_of_the_call_or_of_the_function(ranks: Ranks, route: str) -> None:
    given = pieces([2, 6], True)
    found = [
        ranks.run(on_a_rank, parameters(syncbn.SyncBatchNorm2d(CHANNELS, act=own)), given, act, route, world_size=2)
        for own, act in ((None, "relu"), ("relu", None), ("relu", "relu"))
    ]
    by_function = ranks.run(through_the_function, given, route, world_size=2)
    for rank in range(2):
        for other in (found[1], found[2], by_function):
            assert torch.equal(other[rank]["y"], found[0][rank]["y"])
            assert torch.equal(other[rank]["residual"], found[0][rank]["residual"])


def through_the_function(rank: int, world_size: int, given: list[Piece], route: str) -> dict[str, Tensor]:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS))
    x, residual = leaves(given[rank])
    with ROUTES[route]():
        y = syncbn.sync_batch_norm(
            x, None, None, layer.weight, layer.bias, training=True, act="relu", residual=residual
        )
        y.backward(given[rank].dy)
    return {"y": y.detach(), "residual": residual.grad}


def of_itself(rank: int, world_size: int, layer: nn.Module, given: list[Piece], route: str) -> Tensor:
    x, _ = leaves(given[rank])
    with force_exchange(), ROUTES[route]():
        layer(x, residual=x, act="relu").backward(given[rank].dy)
    return x.grad


@by_each_route
def test_a_residual_that_is_the_input_adds_to_its_gradient(ranks: Ranks, route: str) -> None:
    layer, given = parameters(syncbn.SyncBatchNorm2d(CHANNELS)), pieces([2, 6], False)
    dx = torch.cat(ranks.run(of_itself, layer, given, route, world_size=2))
    x, _ = leaves(whole(given))
    OneProcess(layer)(x, None, residual=x, act="relu").backward(whole(given).dy)
    close(dx, x.grad, 1e-5, "dx")


def partly(
    rank: int, world_size: int, layer: nn.Module, given: list[Piece], needs: tuple[bool, bool], route: str
) -> tuple[list[Tensor | None], int]:
    x, residual = (t.detach().requires_grad_(need) for t, need in zip(given[rank][:2], needs, strict=True))
    with ROUTES[route](), messages() as sent:
        layer(x, residual=residual, act="relu").backward(given[rank].dy)
    return [x.grad, residual.grad], len(sent)


@by_each_route
@pytest.mark.parametrize("frozen", [False, True], ids=["learning", "frozen"])
@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["input", "residual"])
def test_only_what_is_asked_for_gets_a_gradient(
    ranks: Ranks, needs: tuple[bool, bool], frozen: bool, route: str
) -> None:
    given = pieces([2, 6], True)
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS))
    expected = outcome(OneProcess(layer), whole(given), "relu")
    layer.requires_grad_(not frozen)
    results = ranks.run(partly, layer, given, needs, route, world_size=2)
    sent = 2 if needs[0] else 1  # one forward; one backward for the input's gradient
    assert [count for _, count in results] == [sent, sent]
    for which, need in enumerate(needs):
        got = [gradients[which] for gradients, _ in results]
        if need:
            close(torch.cat(got), expected[("x", "residual")[which]], 2e-5, "gradient")
        else:
            assert got == [None, None]


def penalty(layer: nn.Module, piece: Piece, act: str | None) -> dict[str, Tensor]:
    """The first gradients and those of their square norm; the one that comes in depends on the input too."""
    x, residual = leaves(piece)
    y = layer(x, piece.mask, residual=residual, act=act)
    loss = ((y + 1).pow(3) * piece.dy).sum()  # its gradient is not zero where y is
    by = [t for t in (x, residual) if t is not None]
    first = torch.autograd.grad(loss, by, create_graph=True)
    sum(gradient.square().sum() for gradient in first).backward()
    names = [f"{name}, {order}" for order in ("first", "second") for name in ("x", "residual")[: len(by)]]
    return dict(zip(names, [*(t.detach() for t in first), *(t.grad for t in by)], strict=True))


def penalty_on_a_rank(rank: int, world_size: int, layer: nn.Module, given: list[Piece], act: str | None) -> dict:
    with force_exchange():
        return penalty(layer, given[rank], act)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("cut", [[8], [2, 6]], ids=str)
@with_each
def test_a_second_derivative(ranks: Ranks, added: str, cut: list[int], masked: bool) -> None:
    act, residual = ADDED[added]
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))
    given = pieces(cut, residual, masked=masked, dtype=torch.float64)
    results = ranks.run(penalty_on_a_rank, layer, given, act, world_size=len(cut))
    for name, value in penalty(OneProcess(layer), whole(given), act).items():
        close(torch.cat([result[name] for result in results]), value, 1e-8, name)


class Block(nn.Module):
    """The last layer of a residual block, as a model calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = parameters(syncbn.SyncBatchNorm2d(CHANNELS, dtype=torch.float64))

    def forward(self, x: Tensor, mask: Tensor | None, residual: Tensor, act: str) -> Tensor:
        if mask is None:
            return syncbn.norm_act(self.norm, x, act, residual)
        return self.norm(x, mask, residual=residual, act=act)


def by_another_way(rank: int, world_size: int, given: list[Piece], how: str) -> tuple[dict, dict]:
    """The results in eager mode, and compiled or checkpointed."""
    torch._dynamo.reset()
    block = Block()
    again = copy.deepcopy(block)
    call = torch.compile(again, fullgraph=True, backend="aot_eager")

    def ran(net: nn.Module, call: Callable[..., Tensor]) -> dict[str, Tensor]:
        x, residual = leaves(given[rank])
        y = call(x, given[rank].mask, residual, "relu")
        y.backward(given[rank].dy)
        return {"y": y.detach(), "x": x.grad, "residual": residual.grad} | net.state_dict()

    if how == "checkpoint":
        call = lambda *arguments: checkpoint(again, *arguments, use_reentrant=False)  # noqa: E731
    with force_exchange():
        return ran(block, block), ran(again, call)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own doing
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("how", ["compile", "checkpoint"])
def test_compiled_or_checkpointed_it_is_the_same(ranks: Ranks, how: str, masked: bool) -> None:
    given = pieces([2, 6], True, dtype=torch.float64, masked=masked)
    for plain, other in ranks.run(by_another_way, given, how, world_size=2, timeout=100):
        assert plain["norm.num_batches_tracked"] == 1
        for name, value in plain.items():
            close(other[name], value, 1e-10, name)


def saved_bytes(rank: int, world_size: int, act: str | None, dtype: torch.dtype, route: str) -> tuple[int, int]:
    """Bytes kept on top of input and output, and the bytes of the input."""
    layer = syncbn.SyncBatchNorm2d(CHANNELS)
    x, residual = (torch.randn(16, CHANNELS, 8, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    with force_exchange(), ROUTES[route](), what_is_saved() as saved:
        y = layer(x, residual=residual, act=act)
    return saved.bytes_without(x, *([y] if act else [])), x.untyped_storage().nbytes()


@by_each_route
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_data_only_the_input_is_saved_and_the_output_of_an_activation(
    ranks: Ranks, dtype: torch.dtype, act: str | None, route: str
) -> None:
    ((extra, size),) = ranks.run(saved_bytes, act, dtype, route, world_size=1)
    assert extra <= 64 * CHANNELS < size


def with_nans(rank: int, world_size: int, x: Tensor, residual: Tensor, route: str) -> list[Tensor]:
    layer = syncbn.SyncBatchNorm2d(CHANNELS)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    with force_exchange(), ROUTES[route]():
        y = layer(x, residual=residual, act="relu")
        y.backward(torch.ones_like(y))
    return [y.detach(), x.grad, residual.grad]


@by_each_route
@pytest.mark.parametrize("where", ["input", "residual"])
def test_a_nan_goes_through(ranks: Ranks, where: str, route: str) -> None:
    (piece,) = pieces([4], True)
    (piece.x if where == "input" else piece.residual)[1, 1, 2, 2] = torch.nan
    (got,) = ranks.run(with_nans, piece.x, piece.residual, route, world_size=1)
    x, residual = leaves(piece)
    y = F.relu(F.batch_norm(x, None, None, training=True) + residual)
    y.backward(torch.ones_like(y))
    assert y[1, 1, 2, 2].isnan()
    for actual, torchs in zip(got, (y, x.grad, residual.grad), strict=True):
        torch.testing.assert_close(actual, torchs, rtol=1e-4, atol=1e-5, equal_nan=True)


def refused(
    rank: int, world_size: int, act: str | None, shape: tuple[int, ...] | None, training: bool
) -> tuple[str, int]:
    layer = syncbn.SyncBatchNorm2d(CHANNELS).train(training)
    before = copy.deepcopy(layer.state_dict())
    x, residual = torch.randn(4, CHANNELS, 2, 2), None if shape is None else torch.randn(shape)
    calls = (
        lambda: layer(x, residual=residual, act=act),
        lambda: syncbn.norm_act(layer, x, act, residual),
        lambda: syncbn.sync_batch_norm(x, *list(layer.buffers())[:2], training=training, act=act, residual=residual),
    )
    said = set()
    with messages() as sent:
        for call in calls:
            with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
                call()
            said.add(str(error.value))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    (one,) = said
    return one, len(sent)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("act", "shape", "words"),
    [
        ("gelu", None, "act='gelu': use 'relu', or None"),
        ("relu", (4, CHANNELS, 1, 1), f"residual has shape (4, {CHANNELS}, 1, 1), but the input (4, {CHANNELS}, 2, 2)"),
    ],
    ids=["act", "residual"],
)
def test_what_it_cannot_do_is_refused_before_any_message(
    ranks: Ranks, act: str, shape: tuple[int, ...] | None, words: str, training: bool
) -> None:
    for said, sent in ranks.run(refused, act, shape, training, world_size=2):
        assert said.startswith(words)
        assert sent == 0


def test_an_unknown_activation_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="act='gelu': use 'relu'"):
        syncbn.SyncBatchNorm2d(CHANNELS, act="gelu")


def test_revert_refuses_what_it_would_drop_and_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(syncbn.SyncBatchNorm2d(CHANNELS), syncbn.SyncBatchNorm2d(CHANNELS, act="relu"))
    with pytest.raises(TypeError, match="1 has act='relu', which BatchNorm2d would drop"):
        syncbn.revert(model)
    assert [type(layer) for layer in model] == [syncbn.SyncBatchNorm2d] * 2
    assert model[1].fused_act == "relu"
    syncbn.revert(model, only="0")
    assert type(model[0]) is nn.BatchNorm2d
    model[1].fused_act = None
    assert [type(layer) for layer in syncbn.revert(model)] == [nn.BatchNorm2d] * 2
    assert "act" not in vars(model[1])


def test_convert_leaves_a_layer_that_activates_as_it_is() -> None:
    model = nn.Sequential(nn.BatchNorm2d(CHANNELS), syncbn.SyncBatchNorm2d(CHANNELS, act="relu"))
    assert [layer.fused_act for layer in syncbn.convert(model)] == [None, "relu"]


class Doubling(nn.BatchNorm2d):
    """A batch norm with a forward pass of its own, which knows neither act nor residual."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(CHANNELS),
        lambda: syncbn.SyncBatchNorm2d(CHANNELS),
        lambda: syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=2),
        lambda: Doubling(CHANNELS),
        lambda: syncbn.convert(Doubling(CHANNELS)),
        lambda: nn.GroupNorm(1, CHANNELS),
        nn.Identity,
    ],
    ids=["torchs", "ours", "ghost", "subclass", "converted", "group_norm", "identity"],
)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_norm_act_takes_any_layer(make: Callable[[], nn.Module], residual: bool) -> None:
    (piece,) = pieces([4], residual)
    layer = parameters(make())
    expected = copy.deepcopy(layer)(piece.x)
    expected = F.relu(expected if piece.residual is None else expected + piece.residual)
    close(syncbn.norm_act(layer, piece.x, residual=piece.residual), expected, 1e-6, "y")


@pytest.mark.parametrize("layer", [nn.Identity(), nn.BatchNorm2d(CHANNELS), syncbn.SyncBatchNorm2d(CHANNELS)], ids=str)
def test_norm_act_refuses_an_unknown_activation_whatever_the_layer(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="act='gelu': use 'relu'"):
        syncbn.norm_act(layer, torch.randn(4, CHANNELS, 2, 2), "gelu")


@pytest.mark.parametrize("layer", [nn.Identity(), nn.BatchNorm2d(CHANNELS), syncbn.SyncBatchNorm2d(CHANNELS)], ids=str)
def test_norm_act_refuses_a_residual_of_another_shape_whatever_the_layer(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="make them alike"):
        syncbn.norm_act(layer, torch.randn(4, CHANNELS, 2, 2), residual=torch.randn(1, CHANNELS, 1, 1))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_activates_too(pickled: bool) -> None:
    layer = parameters(syncbn.SyncBatchNorm2d(CHANNELS, act="relu"))
    again = pickle.loads(pickle.dumps(layer)) if pickled else copy.deepcopy(layer)
    (piece,) = pieces([4], False)
    assert again.fused_act == "relu"
    assert (again(piece.x) >= 0).all()
    assert torch.equal(again(piece.x), layer(piece.x))
    assert "act='relu'" in repr(again)
    assert "act" not in repr(syncbn.SyncBatchNorm2d(CHANNELS))
    assert again.state_dict().keys() == nn.BatchNorm2d(CHANNELS).state_dict().keys()
