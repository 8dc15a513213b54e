"""The compiled code of ``kernels/*.c``: plain C, built when the package is installed, and called through ctypes."""

import ctypes
import zlib
from pathlib import Path

_KERNELS = Path(__file__).parent / "kernels"
LIBRARY = _KERNELS / "libcpu.so"
SOURCES = [_KERNELS / name for name in ("cpu.c", "cpu_passes.h", "shared_memory.c")]


def load() -> ctypes.CDLL | None:
    """The library; None if it was not built, or for another machine, or from other sources."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.syncbn_source.restype = ctypes.c_uint32
        if library.syncbn_source() != zlib.crc32(b"".join(path.read_bytes() for path in SOURCES)):
            return None
    except (OSError, AttributeError):
        return None
    return library
