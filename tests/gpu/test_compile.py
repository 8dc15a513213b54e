"""``torch.compile(fullgraph=True)`` takes the whole layer; inductor makes the kernels on a GPU."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import syncbn
from tests.gpu.support.steps import ADDED
from tests.nn.support.oracle import close
from tests.nn.support.oracle import with_parameters as parameters

pytestmark = pytest.mark.usefixtures("exchanging")
BACKEND = {"cuda": "inductor", "cpu": "aot_eager"}


class Block(nn.Module):
    """The end of a residual block."""

    def __init__(self, act: str | None, **options: object) -> None:
        super().__init__()
        self.act = act
        self.norm = parameters(syncbn.SyncBatchNorm2d(6, **options))

    def forward(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        return self.norm(x, mask, residual=residual, act=self.act)


def trained(block: nn.Module, call: Callable, shape: tuple[int, ...], residual: bool, mask: bool, device: str) -> dict:
    found = {}
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        x, r, dy = (torch.randn(shape, generator=generator).to(device) + 1 for _ in range(3))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        kept = (torch.rand(len(x), *shape[2:], generator=generator) < 0.7).to(device) if mask else None
        y = call(x, r.requires_grad_() if residual else None, kept)
        y.backward(dy)
        found |= {f"y{step}": y.detach(), f"dx{step}": x.grad, f"dr{step}": r.grad if residual else None}
    found |= {f"{name}.grad": parameter.grad for name, parameter in block.named_parameters()}
    return {name: value for name, value in (found | block.state_dict()).items() if value is not None}


def compare(
    device: str, added: str, shape: tuple[int, ...] = (4, 6, 5, 3), mask: bool = False, **options: object
) -> None:
    torch._dynamo.reset()
    act, residual = ADDED[added]
    block = Block(act, **options).to(device)
    again = deepcopy(block)
    eager = trained(block, block, shape, residual, mask, device)
    call = torch.compile(again, fullgraph=True, backend=BACKEND[device])
    compiled = trained(again, call, shape, residual, mask, device)
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        close(compiled[name], value, 1e-5, name)


@pytest.mark.parametrize("added", ADDED)
def test_in_one_graph_it_equals_eager(device: str, added: str) -> None:
    compare(device, added)


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"biased_running_var": True}], ids=str)
def test_every_option_equals_eager(device: str, options: dict) -> None:
    compare(device, "residual, relu", **options)


def test_a_mask_equals_eager(device: str) -> None:
    compare(device, "residual, relu", mask=True)


def test_an_empty_batch_equals_eager(device: str) -> None:
    compare(device, "residual, relu", shape=(0, 6, 5, 3))
