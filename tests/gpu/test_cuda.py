"""What there is on a GPU alone: nobody waits, graphs, streams, several devices, launches."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import syncbn
from tests.gpu.support.cuda_graphs import Replayed
from tests.gpu.support.steps import ADDED, ROADS, road
from tests.nn.support.oracle import close
from tests.nn.support.oracle import with_parameters as parameters

pytestmark = pytest.mark.usefixtures("exchanging")
by_each_road = pytest.mark.parametrize("name", ROADS)
with_each = pytest.mark.parametrize("added", ADDED)
in_each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Within it a call that waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def images(*shape: int, layout: torch.memory_format = torch.contiguous_format, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, device="cuda", generator=generator) + 1
    return x.contiguous(memory_format=layout).requires_grad_()


def test_a_wait_would_be_seen(cuda: torch.device) -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), nobody_waits():
        torch.ones(1, device=cuda).item()


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"ghost_batch": 2}],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "default",
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@by_each_road
def test_the_host_does_not_wait(cuda: torch.device, name: str, masked: bool, options: dict) -> None:
    layer = syncbn.SyncBatchNorm2d(16, **options).to(cuda)
    x, residual = images(4, 16, 8, 8, layout=torch.channels_last), images(4, 16, 8, 8)
    mask = torch.rand(4, 8, 8, device=cuda) < 0.7 if masked else None
    with road(name, "cuda"):
        for act, added in ADDED.values():  # once for what is compiled, or built, by the first
            layer(x, mask, residual=residual if added else None, act=act).sum().backward()
        with nobody_waits():
            for act, added in ADDED.values():
                layer(x, mask, residual=residual if added else None, act=act).sum().backward()


@pytest.mark.parametrize("momentum", [0.1, None])
@in_each_layout
@with_each
@by_each_road
def test_a_graph_replayed_on_new_data_equals_eager(
    cuda: torch.device, name: str, added: str, layout: torch.memory_format, momentum: float | None
) -> None:
    act, residual = ADDED[added]
    options = {"act": act, "residual": residual, "layout": layout, "momentum": momentum}
    with road(name, "cuda"):
        graph, eager = (Replayed((4, 19, 6, 5), captured=captured, **options).run(3) for captured in (True, False))
    assert graph.keys() == eager.keys()
    assert graph["num_batches_tracked, step 2"] == 3  # the capture itself moves nothing
    for key, value in eager.items():
        close(graph[key], value, 1e-6, key)


@pytest.mark.parametrize("samples", [0, 1], ids=["empty", "one value"])
@by_each_road
def test_a_graph_of_no_value_or_of_one(cuda: torch.device, name: str, samples: int) -> None:
    # In eager mode one value is refused; in a graph nobody may ask, and the running variance stays.
    with road(name, "cuda"):
        found = Replayed((samples, 19, 1, 1), captured=True).run(2)
    assert all(value.isfinite().all() for value in found.values())
    assert torch.equal(found["running_var, step 1"], torch.ones(19))
    assert found["num_batches_tracked, step 1"] == 2 * samples
    assert found["running_mean, step 1"].any() == (samples > 0)


@by_each_road
def test_two_streams_at_once(cuda: torch.device, name: str) -> None:
    layers = [parameters(syncbn.SyncBatchNorm2d(64)).to(cuda) for _ in range(2)]
    inputs = [images(8, 64, 28, 28, seed=seed) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with road(name, "cuda"):
        expected = [torch.autograd.grad(layer(x, act="relu").square().sum(), x)[0] for layer, x in zip(layers, inputs)]  # noqa: B905
        torch.cuda.synchronize()
        found: list[list[Tensor]] = [[], []]
        for _ in range(10):
            for which, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    y = layers[which](inputs[which], act="relu")
                    found[which] += torch.autograd.grad(y.square().sum(), inputs[which])
        torch.cuda.synchronize()
    for which, results in enumerate(found):
        for dx in results:
            close(dx, expected[which], 1e-5, f"dx, stream {which}")


@by_each_road
def test_a_layer_on_another_device_than_the_current_one(cuda: torch.device, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for device in ("cuda:0", "cuda:1"):
        x, residual = (images(4, 16, 8, 8, seed=seed).detach().to(device).requires_grad_() for seed in (0, 1))
        layer = parameters(syncbn.SyncBatchNorm2d(16)).to(device)
        with road(name, "cuda"):
            y = layer(x, residual=residual, act="relu")
            y.square().sum().backward()
        assert torch.cuda.current_device() == cuda.index
        results.append([t.cpu() for t in (y, x.grad, residual.grad, layer.weight.grad, *layer.buffers())])
    for first, second in zip(*results, strict=True):
        close(second, first, 1e-6, "on another device")


def kernels(layer: torch.nn.Module, x: Tensor, residual: Tensor | None, act: str | None) -> list[str]:
    """The names of what a forward and backward pass has the device do."""
    dy = torch.ones_like(x)
    leaves = [t for t in (x, residual, *layer.parameters()) if t is not None]
    for _ in range(2):
        torch.autograd.grad(layer(x, residual=residual, act=act), leaves, dy)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        torch.autograd.grad(layer(x, residual=residual, act=act), leaves, dy)
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@with_each
@in_each_layout
def test_a_step_is_a_handful_of_launches(cuda: torch.device, layout: torch.memory_format, added: str) -> None:
    # Forward: sums and their merging, statistics, running update, normalize; backward: sums, merging, input gradient.
    # And what NCCL does to send to itself.
    act, residual = ADDED[added]
    x, r = images(2, 64, 28, 28, layout=layout), images(2, 64, 28, 28, layout=layout, seed=1)
    launched = kernels(syncbn.SyncBatchNorm2d(64).to(cuda), x, r if residual else None, act)
    if not launched:
        pytest.skip("the profiler sees no kernels here")
    assert len([name for name in launched if "nccl" not in name.lower() and "mem" not in name.lower()]) <= 8, launched
