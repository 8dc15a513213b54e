"""A GPU that computes nothing: Triton compiles for it and launches on it, on a machine without one.

What the kernels would compute is another matter, for the interpreter. This shows that they compile, that each launch
gives them what they take, and what it costs the host. A process that is to have one is started by :func:`environment`.
"""

import ctypes
import importlib.util
import os
import subprocess
from pathlib import Path

import torch

from syncbn.nn.kernels import gpu

LIBRARY = "libcuda.so.1"  # what Triton links to


def environment(place: Path) -> dict[str, str]:
    """Builds the driver in ``place``, and gives the environment of a process that finds it."""
    found = importlib.util.find_spec("triton")
    assert found is not None
    assert found.submodule_search_locations is not None
    headers = Path(found.submodule_search_locations[0]) / "backends/nvidia/include"
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", f"-I{headers}", "-o", str(place / LIBRARY)]
    subprocess.run([*command, str(Path(__file__).with_name("fake_gpu.c"))], check=True)
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | {"LD_LIBRARY_PATH": str(place), "TRITON_LIBCUDA_PATH": str(place)}


def install() -> ctypes.CDLL:
    """Makes Triton take it for an H200, and the layer take the CPU's tensors for its; returns the driver."""
    _pretend()
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    triton.runtime.driver.set_active(CudaDriver())
    gpu._usable = lambda interpreted: True
    gpu._device = lambda index: (132, gpu._STAGES)
    library = ctypes.CDLL(LIBRARY)
    library.hollow_launches.restype = ctypes.c_long
    return library


def fail() -> None:
    """The same, but that Triton has yet to find out that it cannot build its driver."""
    _pretend()
    torch.cuda.is_available = lambda: True


def _pretend() -> None:
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    gpu.interpreted = True
