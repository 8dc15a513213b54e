"""Adds ``conf/`` to the wheel, and builds ``syncbn/nn/kernels/*.c`` where there is a C compiler."""

import os
import platform
import shutil
import subprocess
import sysconfig
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = [f"syncbn/nn/kernels/{name}" for name in ("cpu.c", "cpu_passes.h", "shared_memory.c")]
LIBRARY = "syncbn/nn/kernels/libcpu.so"
FLAGS = ["-O3", "-shared", "-fPIC"]
# With OpenMP its loops use several threads; without it, one, and it only guides the vectorizer.
OPENMP = ["-fopenmp", "-fopenmp-simd"]


class Native(BuildHookInterface):  # type: ignore[misc]  # hatchling is there while building only
    """Compiles the passes over the data; without a compiler the package works as well, but slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel, or an editable install, is put together."""
        if version != "editable":  # which finds conf/ beside the package: syncbn/training/config/conf_directory.py
            build_data["force_include"]["conf"] = "syncbn/conf"
        if not build(Path(self.root)):
            return
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def build(root: Path) -> bool:
    """Compiles the library, and says whether there is one now."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is not None and shutil.which(compiler.split()[0]) is not None and platform.system() != "Windows":
        identity = f"-DSOURCE={zlib.crc32(b''.join((root / name).read_bytes() for name in SOURCES))}u"
        code = [name for name in SOURCES if name.endswith(".c")]
        draft = root / f"{LIBRARY}.draft"  # so that no process finds half of one
        for openmp in OPENMP:
            command = [*compiler.split(), *FLAGS, identity, openmp, "-o", str(draft), *code, "-lm"]
            if subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0:
                draft.replace(root / LIBRARY)
                return True
    (root / LIBRARY).unlink(missing_ok=True)
    return False
