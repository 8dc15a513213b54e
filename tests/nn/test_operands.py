"""What the layer takes, and what it gets back: torch's batch norm decides, and no memory is read as another type."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from syncbn.nn.kernels import cpu, dispatch
from syncbn.testing import force_exchange, without_native
from tests.nn.support.oracle import CHANNELS
from tests.nn.support.own_forward import NormAct
from tests.support.ranks import Ranks, messages

REFUSED = [torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
ROUTES: dict[str, Callable[[], AbstractContextManager[None]]] = {"compiled": nullcontext, "torchs": without_native}


def through_the_function(x: Tensor, **options: object) -> Tensor:
    return syncbn.sync_batch_norm(x, torch.zeros(CHANNELS), torch.ones(CHANNELS), **options)


def ways() -> dict[str, Callable[[Tensor], object]]:
    """All ways in; each says the layer's name."""
    layer, own = syncbn.SyncBatchNorm2d(CHANNELS), syncbn.convert(nn.Sequential(NormAct(CHANNELS)))
    mask = torch.ones(4, 1, 1, dtype=torch.bool)
    return {
        "SyncBatchNorm2d(3)": layer,
        "SyncBatchNorm2d(3) ": lambda x: layer(x, mask),
        "SyncBatchNorm2d(3)  ": lambda x: syncbn.norm_act(layer, x),
        "SyncBatchNorm2d(3)   ": syncbn.SyncBatchNorm2d(CHANNELS, ghost_batch=2),
        "SyncBatchNorm2d(3)    ": syncbn.SyncBatchNorm2d(CHANNELS, group=1),
        "SyncBatchNorm2d(3)     ": lambda x: syncbn.SyncBatchNorm2d(CHANNELS).eval()(x),
        "SyncBatchNorm2d(3)      ": lambda x: syncbn.SyncBatchNorm2d(CHANNELS).eval()(x, mask),
        "sync_batch_norm": lambda x: through_the_function(x, training=True),
        "sync_batch_norm ": lambda x: through_the_function(x, training=False),
        "0": own,
    }


def refused(rank: int, world_size: int) -> list[tuple[str, str, str]]:
    said = []
    for dtype in REFUSED:
        x = torch.ones(4, CHANNELS, 2, 2).to(dtype)
        with pytest.raises(NotImplementedError):  # torch's own
            F.batch_norm(x, torch.zeros(CHANNELS), torch.ones(CHANNELS))
        for name, way in ways().items():
            with messages() as sent, pytest.raises(NotImplementedError) as caught:
                way(x)
            assert len(sent) == 0
            said.append((name.strip(), str(dtype), str(caught.value)))
    return said


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_torchs_batch_norm_refuses_is_refused_by_name_before_any_message(ranks: Ranks, world_size: int) -> None:
    for said in ranks.run(refused, world_size=world_size):
        for name, dtype, message in said:
            assert message.startswith(
                f"layer {name}: batch norm is not implemented for an input of {dtype}; use x.float()"
            )
            assert "\n" not in message


def test_adapted_layers_refuse_it_too() -> None:
    layer = syncbn.SyncBatchNorm2d(CHANNELS).eval()
    with syncbn.adapt(layer), pytest.raises(NotImplementedError, match=r"layer SyncBatchNorm2d\(3\)"):
        layer(torch.ones(4, CHANNELS, 2, 2, dtype=torch.int32))


def replaced(rank: int, world_size: int) -> list[tuple[str, str, int]]:
    """What is said of a parameter or a running statistic that somebody has replaced."""
    said = []
    for name in ("running_mean", "running_var", "weight", "bias"):
        for kind, value in (
            ("long", torch.ones(2 * CHANNELS)),
            ("matrix", torch.ones(1, CHANNELS)),
            ("integer", torch.ones(CHANNELS, dtype=torch.int64)),
            ("elsewhere", torch.ones(CHANNELS, device="meta")),
            ("None", None),
        ):
            for options in ({}, {"ghost_batch": 2}, {"biased_running_var": True}):
                layer = syncbn.SyncBatchNorm2d(CHANNELS, **options)
                if kind == "None" and not name.startswith("running"):
                    continue
                delattr(layer, name)
                setattr(layer, name, value)
                with messages() as sent, pytest.raises((ValueError, RuntimeError)) as caught:
                    layer(torch.randn(4, CHANNELS, 2, 2))
                said.append((name, str(caught.value), len(sent)))
    return said


def test_a_replaced_parameter_or_buffer_is_refused_by_name_before_any_message(ranks: Ranks) -> None:
    for said in ranks.run(replaced, world_size=2):
        for name, message, sent in said:
            assert message.startswith("layer SyncBatchNorm2d(3): ")
            assert name in message
            assert "\n" not in message
            assert sent == 0


def test_a_mask_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="the mask is on meta, but the input on cpu"):
        syncbn.SyncBatchNorm2d(CHANNELS)(torch.randn(4, CHANNELS, 2, 2), torch.ones(4, 1, 1, device="meta").bool())


def of_any_layout(rank: int, world_size: int) -> list[Tensor]:
    """A step with parameters and buffers that are strided, expanded, or of other floating types."""
    results = []
    for wide in (torch.float32, torch.float64, torch.bfloat16):
        layer = syncbn.SyncBatchNorm2d(CHANNELS)
        layer.weight = nn.Parameter(torch.full((CHANNELS, 2), 2.0, dtype=wide)[:, 0])
        layer.bias = nn.Parameter(torch.ones(1, dtype=wide).expand(CHANNELS))
        layer.running_mean = torch.zeros(CHANNELS, 2, dtype=wide)[:, 1]
        layer.running_var = torch.ones(CHANNELS, 3, dtype=wide)[:, 1]
        x = torch.randn(4, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results += [y.detach(), x.grad, layer.weight.grad, layer.running_mean]
    return results


def test_parameters_and_buffers_of_any_layout_and_floating_type_are_right(ranks: Ranks) -> None:
    for step in ranks.run(of_any_layout, world_size=2):
        one, x = nn.BatchNorm2d(CHANNELS), torch.randn(4, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            one.weight.fill_(2)
            one.bias.fill_(1)
        x.requires_grad_()
        y = one(torch.cat([x, x]))
        y.square().sum().backward()
        for at in range(0, 12, 4):
            torch.testing.assert_close(step[at], y[:4].detach())
            torch.testing.assert_close(step[at + 1], x.grad / 2, rtol=1e-4, atol=1e-4)
            close = {"rtol": 2e-2, "atol": 2e-2} if at == 8 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(step[at + 2].float(), one.weight.grad / 2, **close)
            torch.testing.assert_close(step[at + 3].float(), one.running_mean, **close)


class Wrapped(Tensor):
    """A subclass that a hook gives back."""


def strided(t: Tensor) -> Tensor:
    both = torch.stack([t, torch.ones_like(t)], -1)
    return both[..., 0]


EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda t: t,
    "copy": lambda t: t.clone(),
    "strided": strided,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "subclass": lambda t: t.as_subclass(Wrapped),
    "numbers per channel strided": lambda t: strided(t) if t.dim() < 3 else t,
    "numbers per channel of a subclass": lambda t: t.as_subclass(Wrapped) if t.dim() < 3 else t,
    "statistics negative": lambda t: torch._neg_view(-t) if t.dim() == 2 else t,
    "negative": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
}
CHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "half": lambda t: t.bfloat16() if t.dtype == torch.float32 else t,
    "double": lambda t: t.double() if t.dtype == torch.float32 else t,
    "fewer channels": lambda t: t[..., :1] if t.dim() < 3 else t,
    "fewer samples": lambda t: t[:2] if t.dim() == 4 else t,
    "flat": lambda t: t.flatten() if t.dim() == 4 else t,
    "mask of bytes": lambda t: t.to(torch.uint8) if t.dtype == torch.bool else t,
    "no values": lambda t: t.to("meta"),
}


def gradients(hook: Callable[[Tensor], Tensor], masked: bool, act: str | None, again: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 3, 3, generator=generator).requires_grad_()
    residual, dy = (torch.randn(6, 5, 3, 3, generator=generator) for _ in range(2))
    mask = torch.rand(6, 3, 3, generator=generator) < 0.7
    layer = syncbn.SyncBatchNorm2d(5)
    with force_exchange():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, hook):
            y = layer(x, mask if masked else None, residual=residual if act else None, act=act)
        found = torch.autograd.grad((y * dy).sum(), [x, layer.weight, layer.bias], create_graph=again)
    return [t.detach().as_subclass(Tensor) for t in found]


def with_hooks(rank: int, world_size: int, masked: bool, act: str | None, again: bool, route: str) -> dict[str, str]:
    said = {}
    with ROUTES[route]():
        expected = gradients(EQUAL["same"], masked, act, again)
        for hook in EQUAL.values():
            torch.testing.assert_close(gradients(hook, masked, act, again), expected)
        with torch.autograd.graph.save_on_cpu():
            torch.testing.assert_close(gradients(EQUAL["copy"], masked, act, again), expected)
        for name, hook in CHANGED.items():
            if masked or name != "mask of bytes":
                with pytest.raises(RuntimeError) as caught:
                    gradients(hook, masked, act, again)
                said[name] = str(caught.value)
    return said


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("again", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_saved_tensor_may_come_back_anyhow_but_not_as_another(
    ranks: Ranks, masked: bool, act: str | None, again: bool, route: str
) -> None:
    (said,) = ranks.run(with_hooks, masked, act, again, route, world_size=1)
    for name, message in said.items():
        assert message.startswith("layer SyncBatchNorm2d(5): a saved tensor is "), name
        assert "\n" not in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_of_another_type_is_not_read_as_the_inputs(dtype: torch.dtype) -> None:
    # Autograd has it in the type of the output; nothing else may reach compiled code.
    x, dy = torch.randn(6, 5, 3, 3), torch.randn(6, 5, 3, 3).to(dtype)
    local = dispatch.local_sums(x)
    found = dispatch.rounded(local.sums, x, local)
    sums, *_ = dispatch.gradient_sums(dispatch.pair(x, dy, None, found, None, 1e-5), found, None, 1e-5)
    torch.testing.assert_close(sums[:5].float(), dy.float().sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def freed(rank: int, world_size: int) -> str:
    x = torch.randn(6, 5, 3, 3, requires_grad=True) * 1
    with force_exchange():
        y = syncbn.SyncBatchNorm2d(5)(x)
        x.untyped_storage().resize_(0)  # as those do who save memory by themselves
        with pytest.raises(RuntimeError) as caught:
            y.sum().backward()
    return str(caught.value)


def test_memory_that_was_freed_is_not_read(ranks: Ranks) -> None:
    (said,) = ranks.run(freed, world_size=1)
    assert "was freed" in said or not cpu.built()  # torch's kernels have words of their own
