"""Mixed precision as it is used, models in half precision, and what is kept for the backward pass."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn
from tests.gpu.support.steps import ADDED, ROADS, road
from tests.nn.kernels.test_saved_memory import what_is_saved
from tests.nn.support.oracle import close
from tests.nn.support.oracle import with_parameters as parameters

pytestmark = pytest.mark.usefixtures("exchanging")
by_each_road = pytest.mark.parametrize("name", ROADS)
HALVES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str)


class Net(nn.Module):
    """Convolutions, a batch norm with a ReLU, one with a residual too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.again = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = syncbn.norm_act(self.norm, self.first(x))
        return syncbn.norm_act(self.again, self.second(x), residual=x)


def nets(device: str) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, alike."""
    torch.manual_seed(0)
    net = Net()
    return syncbn.convert(deepcopy(net)).to(device), net.to(device)


def images(device: str) -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).to(device)


@HALVES
@by_each_road
def test_autocast_and_a_scaled_loss_train_as_torchs_layers_do(
    device: str, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    def train(net: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8, enabled=dtype == torch.float16)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(device, dtype):
                y = net(images(device).contiguous(memory_format=torch.channels_last))
                loss = (y.float() - 1).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return y, net.state_dict()

    ours, torchs = nets(device)
    with road(name, device):
        y, found = train(ours)
    expected_y, expected = train(torchs)
    assert y.dtype == expected_y.dtype
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        close(found[key], value, tolerance, key)


@HALVES
@by_each_road
def test_a_model_in_half_precision(device: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, torchs = (net.to(dtype) for net in nets(device))
    with road(name, device):
        y = ours(images(device).to(dtype))
        y.sum().backward()
    expected = torchs.float()(images(device))
    assert y.dtype == dtype
    assert {p.grad.dtype for p in ours.parameters()} == {dtype}
    close(y, expected, tolerance, "y")
    for key, value in torchs.state_dict().items():
        if "running" in key:
            assert ours.state_dict()[key].dtype == dtype
            close(ours.state_dict()[key], value, tolerance, key)


def test_float64_keeps_its_digits(device: str) -> None:
    # Torch's kernels do it, in float64; Triton's are for what trains.
    layer, twin = parameters(syncbn.SyncBatchNorm2d(3)).double(), nn.BatchNorm2d(3).double()
    twin.load_state_dict(layer.state_dict())
    layer, twin = layer.to(device), twin.to(device)
    x = (images(device).double() + 1).requires_grad_()
    again = x.detach().clone().requires_grad_()
    with road("triton", device):
        y = layer(x, residual=x, act="relu")
    y.square().sum().backward()
    expected = F.relu(twin(again) + again)
    expected.square().sum().backward()
    close(y, expected, 1e-10, "y")
    close(x.grad, again.grad, 1e-8, "dx")
    close(layer.running_var, twin.running_var, 1e-10, "running_var")


@pytest.mark.parametrize(
    ("differ", "tolerance"),
    [
        (lambda x, residual: (x, residual.double()), 1e-5),
        (lambda x, residual: (x.bfloat16(), residual), 5e-2),
        (lambda x, residual: (x, residual[..., :1].expand_as(x)), 1e-5),
        (lambda x, residual: (x[:, :, ::2], residual[:, :, ::2]), 1e-5),
    ],
    ids=["float64 residual", "bfloat16 input", "expanded residual", "strided"],
)
def test_what_the_kernels_do_not_take_goes_by_torchs(device: str, differ: Callable, tolerance: float) -> None:
    x, residual = images(device), images(device).flip(0)
    layer = parameters(syncbn.SyncBatchNorm2d(3)).to(device)
    got, expected = [], []
    for results, which in ((got, "triton"), (expected, "aten")):
        mine = deepcopy(layer)
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        with road(which, device):
            a, b = differ(*leaves)
            y = mine(a, residual=b, act="relu")
            y.square().sum().backward()
        results += [y, *(leaf.grad for leaf in leaves), mine.weight.grad, mine.running_var]
    for actual, value in zip(got, expected, strict=True):
        assert actual.dtype == value.dtype
        close(actual, value, tolerance, "value")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("added", ADDED)
def test_an_activation_keeps_a_bit_a_value_at_most(device: str, added: str, layout: torch.memory_format) -> None:
    act, residual = ADDED[added]
    x, r = (torch.randn(4, 16, 16, 16, device=device).contiguous(memory_format=layout) for _ in range(2))
    layer = syncbn.SyncBatchNorm2d(16).to(device)
    with road("triton", device), what_is_saved() as saved:
        layer(x.requires_grad_(), residual=r.requires_grad_() if residual else None, act=act)
    bits = x.numel() // 8 if act and residual else 0
    assert saved.bytes_without(x) <= bits + 64 * 16


@by_each_road
def test_a_nan_goes_through(device: str, name: str) -> None:
    for where in (0, 1):
        given = [images(device), images(device).flip(0)]
        given[where][1, 1, 2, 2] = torch.nan
        x, residual = (t.requires_grad_() for t in given)
        with road(name, device):
            y = syncbn.SyncBatchNorm2d(3).to(device)(x, residual=residual, act="relu")
            y.sum().backward()
        again = [t.detach().clone().requires_grad_() for t in given]
        expected = F.relu(F.batch_norm(again[0], None, None, training=True) + again[1])
        expected.sum().backward()
        assert expected.isnan().any()
        for actual, value in zip((y, x.grad, residual.grad), (expected, *(t.grad for t in again)), strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-4, equal_nan=True)
