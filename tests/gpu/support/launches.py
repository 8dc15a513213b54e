"""Launches of the kernels, noted; and whether what we keep is what Triton would take. A program, for a hollow GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import syncbn
from syncbn.nn.kernels import gpu, triton_tiling
from syncbn.testing import force_exchange
from tests.gpu.support import fake_gpu

# The first are few values, to one program a channel; then many. Sizes that are 1, that 16 divides and does not.
SHAPES = [(2, 16, 4, 4), (3, 5, 7, 1), (64, 16, 32, 32)]


@contextmanager
def noted() -> Iterator[list[tuple[Any, ...]]]:
    """All launches within: key, name, grid, arguments, warps."""
    seen: list[tuple[Any, ...]] = []
    start = gpu._start

    def note(key: Any, kernel: Any, name: str, grid: Any, arguments: Any, warps: int) -> None:
        seen.append((key, name, grid, arguments, warps))
        start(key, kernel, name, grid, arguments, warps)

    with mock.patch.object(gpu, "_start", note):
        yield seen


def step(
    device: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, added: str, eps: float = 1e-5
) -> list[tuple[Any, ...]]:
    """The launches of a training step, forward and backward."""
    layer = syncbn.SyncBatchNorm2d(shape[1], eps=eps, device=device)
    x, residual, dy = (torch.zeros(shape, device=device).to(dtype) for _ in range(3))
    if layout == "channels_last":
        x, residual, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual, dy))
    elif layout == "sliced":  # from an address that 16 does not divide
        x, residual, dy = (
            torch.zeros(t.numel() + 1, device=device).to(dtype)[1:].view(shape) for t in (x, residual, dy)
        )
    leaves = [t.requires_grad_() for t in (x, residual)]
    act = "relu" if "relu" in added else None
    with noted() as seen:
        layer(leaves[0], residual=leaves[1] if "residual" in added else None, act=act).backward(dy)
    return seen


def check(device: str) -> int:
    """Asserts that what is kept for each launch is what Triton takes for its arguments; returns how many were made."""
    seen = []
    with force_exchange():
        for number, shape in enumerate(SHAPES):
            for layout in ("contiguous", "channels_last", "sliced"):
                dtype = (torch.float32, torch.bfloat16)[number % 2]
                for added in ("relu", "residual+relu"):
                    seen += step(device, shape, layout, dtype, added)
        seen += step(device, SHAPES[0], "contiguous", torch.float32, "relu", eps=0)  # a whole number, for once
    compare(seen)
    return len(seen)


def compare(seen: list[tuple[Any, ...]]) -> None:
    from syncbn.nn.kernels import triton_kernels

    for key, name, grid, arguments, warps in seen:
        taken = getattr(triton_kernels, name)[grid](*arguments, num_warps=warps)
        assert gpu._compiled[key] is taken, f"{name}: Triton takes another kernel than the one kept as {key}"


def names(launched: list[tuple[Any, ...]]) -> list[str]:
    return [name for _, name, *_ in launched]


def large() -> None:
    """More values than 32 bits count, of which a hollow GPU reads none."""
    x = torch.zeros(16, dtype=torch.bfloat16)
    with noted() as seen:
        for rows, positions in ((True, 1), (False, 2**13)):
            for outer in (2**10, 2**33 // positions):
                gpu.sums(x, triton_tiling.Shape(rows, outer, 16, positions, 2, 132, 3))
    assert names(seen) == ["sums", "sums", "merge", "sums", "merge", "sums", "merge"]
    compare(seen)


def main() -> None:
    library = fake_gpu.install()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    made = check("cpu")
    assert library.hollow_launches() == 2 * made  # and each once more by Triton
    large()
    with force_exchange():
        for shape in (SHAPES[0], SHAPES[-1]):
            print(*names(step("cpu", shape, "channels_last", torch.float32, "residual+relu")))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
