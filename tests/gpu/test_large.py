"""More than 2^31 elements: every value of the output and the gradients against float64, a channel at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import syncbn
from syncbn.testing import force_exchange
from tests.gpu.support.steps import ADDED, road
from tests.nn.support.oracle import with_parameters as parameters
from tests.support.ranks import Ranks

SHAPES = {"cuda": (2, 64, 4096, 4100), "cpu": (2, 3, 8, 9)}  # on the CPU for the test to be tried, not the layer
GIB = 2**30
NEEDED = 40 * GIB  # input, output, residual and the gradients of all, 4 GiB each, and a channel in float64 some times


def of_many(device: str, layout: torch.memory_format, seed: int) -> Tensor:
    t = torch.empty(SHAPES[device], dtype=torch.bfloat16, device=device, memory_format=layout)
    return t.normal_(generator=torch.Generator(device).manual_seed(seed))


def worst_errors(rank: int, world_size: int, device: str, layout: torch.memory_format, added: str) -> dict[str, float]:
    """The largest errors, in roundings of bfloat16; in a process of its own, for an error of the device ends it."""
    act, has_residual = ADDED[added]
    x, dy, r = (of_many(device, layout, seed) for seed in range(3))
    layer = parameters(syncbn.SyncBatchNorm2d(x.shape[1], momentum=1.0)).to(device)
    x.requires_grad_()
    residual = r.requires_grad_() if has_residual else None
    with force_exchange(), road("triton", device):
        y = layer(x, residual=residual, act=act)
        y.backward(dy)
    worst: dict[str, float] = {}
    for channel in range(x.shape[1]):
        one = {name: t.detach()[:, channel].double() for name, t in (("x", x), ("dy", dy), ("r", r))}
        var, mean = torch.var_mean(one["x"], correction=0)
        invstd = (var + layer.eps).rsqrt()
        xhat = (one["x"] - mean) * invstd
        weight, bias = layer.weight[channel].double(), layer.bias[channel].double()
        z = weight * xhat + bias
        if has_residual:
            z += one["r"]
        expected = {"y": F.relu(z) if act else z}
        # Where rounding decides whether the activation lets through, nothing is compared.
        clear = z.abs() > 1e-4 if act else torch.ones_like(z, dtype=torch.bool)
        through = one["dy"] * (y.detach()[:, channel] > 0) if act else one["dy"]
        expected["dx"] = weight * invstd * (through - through.mean() - xhat * (through * xhat).mean())
        got = {"y": y, "dx": x.grad}
        if residual is not None:
            got["dresidual"], expected["dresidual"] = residual.grad, through
        for name, value in expected.items():
            unit = (value.abs() + 1e-3) * torch.finfo(torch.bfloat16).eps
            error = ((got[name].detach()[:, channel].double() - value).abs() / unit)[clear].max().item()
            worst[name] = max(worst.get(name, 0.0), error)
        n = one["x"].numel()
        for name, actual, value in (
            ("running_mean", layer.running_mean, mean),
            ("running_var", layer.running_var, var * n / (n - 1)),
            ("dgamma", layer.weight.grad / n, (through * xhat).mean()),
            ("dbeta", layer.bias.grad / n, through.mean()),
        ):
            worst[name] = max(worst.get(name, 0.0), (actual[channel] - value).abs().item() / 1e-5)
    return worst


@pytest.mark.parametrize("added", ["", "residual, relu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_than_2_to_the_31_elements(device: str, ranks: Ranks, layout: torch.memory_format, added: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < NEEDED:
            pytest.skip(f"needs {NEEDED // GIB} GiB of GPU memory, {free / GIB:.0f} are free")
    (worst,) = ranks.run(worst_errors, device, layout, added, world_size=1, timeout=240)
    for name, times in worst.items():
        assert times <= 1, f"{name}: off by {times:.3g} times what rounding may do"
