"""Context managers for tests and benchmarks that force the layer to use another implementation."""

from collections.abc import Iterator
from contextlib import contextmanager

from syncbn.nn.comm import all_reduce
from syncbn.nn.kernels import cpu, gpu


@contextmanager
def force_exchange() -> Iterator[None]:
    """Let a group of one rank all-reduce with itself, so that a single process runs the distributed code."""
    before, all_reduce.forced = all_reduce.forced, True
    try:
        yield
    finally:
        all_reduce.forced = before


@contextmanager
def without_native() -> Iterator[None]:
    """Use torch's kernels instead of the compiled code for the CPU, as without a C compiler."""
    before, cpu.disabled = cpu.disabled, True
    try:
        yield
    finally:
        cpu.disabled = before


@contextmanager
def without_gpu() -> Iterator[None]:
    """Use torch's kernels instead of the Triton kernels, as without Triton."""
    before, gpu.disabled = gpu.disabled, True
    try:
        yield
    finally:
        gpu.disabled = before


@contextmanager
def interpreted() -> Iterator[None]:
    """Run the GPU kernels on CPU tensors, in Triton's interpreter.

    Raises:
        RuntimeError: Triton is not installed, or TRITON_INTERPRET=1 was not set when it was imported.
    """
    if not gpu.interprets():
        raise RuntimeError("interpreted(): needs Triton, and TRITON_INTERPRET=1 in the environment from the start")
    before, gpu.interpreted = gpu.interpreted, True
    try:
        yield
    finally:
        gpu.interpreted = before
