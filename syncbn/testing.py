"""For tests and benchmarks: make the layer take a road that it would not take here."""

from collections.abc import Iterator
from contextlib import contextmanager

from syncbn.nn.comm import all_reduce
from syncbn.nn.kernels import cpu, gpu


@contextmanager
def force_exchange() -> Iterator[None]:
    """Within this context a group of one rank exchanges with itself, so that one process runs the distributed code."""
    before, all_reduce.forced = all_reduce.forced, True
    try:
        yield
    finally:
        all_reduce.forced = before


@contextmanager
def without_native() -> Iterator[None]:
    """Within this context torch's kernels do what compiled code does otherwise, as where there is no C compiler."""
    before, cpu.disabled = cpu.disabled, True
    try:
        yield
    finally:
        cpu.disabled = before


@contextmanager
def without_gpu() -> Iterator[None]:
    """Within this context torch's kernels do what Triton's do otherwise, as where there is no Triton."""
    before, gpu.disabled = gpu.disabled, True
    try:
        yield
    finally:
        gpu.disabled = before


@contextmanager
def interpreted() -> Iterator[None]:
    """Within this context tensors of the CPU go through the kernels for GPUs, in Triton's interpreter.

    Raises:
        RuntimeError: there is no Triton, or TRITON_INTERPRET=1 was not in the environment when it was imported.
    """
    if not gpu.interprets():
        raise RuntimeError("interpreted(): needs Triton, and TRITON_INTERPRET=1 in the environment from the start")
    before, gpu.interpreted = gpu.interpreted, True
    try:
        yield
    finally:
        gpu.interpreted = before
