"""Marks of tests that need the compiled code: with a compiler they are not skipped, but fail where it is missing."""

import os
import shutil
import sys

import pytest

HAS_COMPILER = bool(os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc"))
needs_library = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler when the package was installed")
needs_shared_memory = pytest.mark.skipif(
    sys.platform != "linux" or not HAS_COMPILER, reason="ranks share memory on Linux, with the compiled code"
)
