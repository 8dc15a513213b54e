"""torchvision can be imported beside a torch that its operators were not built for."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from syncbn.training import vision_packages

# What torchvision 0.28 does at its import where its operators have not been loaded.
REGISTERS = (
    "import torch\n\n\n@torch.library.register_fake('torchvision::nms')\ndef nms(dets, scores, threshold): ...\n"
)
PROGRAM = """
from syncbn.training import vision_packages
vision_packages.allow_missing_operators()
vision_packages.allow_missing_operators()
import torchvision
assert vision_packages.lacks_operators()
"""


@pytest.fixture
def without_operators(tmp_path: Path) -> Path:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import _meta_registrations\n", encoding="utf-8")
    (package / "_meta_registrations.py").write_text(REGISTERS, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("program", "error"), [(PROGRAM, ""), ("import torchvision", "torchvision::nms does not exist")]
)
def test_missing_operators_do_not_stop_the_import(without_operators: Path, program: str, error: str) -> None:
    code = f"import sys\nsys.path.insert(0, {str(without_operators)!r})\n{program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert (done.returncode, error in done.stderr) == (int(bool(error)), True), done.stderr


def test_the_command_names_the_torch_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vision_packages.install_command() == f"pip install timm torchvision torch=={version('torch')}"
