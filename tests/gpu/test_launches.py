"""What is started on a GPU, and by how many launches; where there is no GPU, on one that computes nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.support import fake_gpu, launches

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def without_a_gpu(device: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process on a GPU that computes nothing."""
    if device != "cpu":
        pytest.skip("there is a GPU here")
    return fake_gpu.environment(tmp_path_factory.mktemp("hollow"))


def test_kernels_compile_launch_and_are_kept_by_all_that_triton_looks_at(without_a_gpu: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.gpu.support.launches"]
    done = subprocess.run(
        command, cwd=ROOT, env=without_a_gpu, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    few, many = done.stdout.splitlines()
    # One launch to pack, one to unpack and move the running statistics, one a pass; where many packed, one to merge.
    assert few == "sums update_running normalize gradient_sums input_gradient"
    assert many == "sums merge update_running normalize gradient_sums merge input_gradient"


def test_what_is_kept_is_what_triton_takes(cuda: object, exchanging: None) -> None:
    assert launches.check("cuda") > 100


def test_where_triton_cannot_compile_torchs_kernels_are_taken_and_it_is_said_why(
    without_a_gpu: dict[str, str], tmp_path: Path
) -> None:
    program = "from tests.gpu.support import fake_gpu; from syncbn.nn.kernels import gpu; fake_gpu.fail(); "
    program += "print(gpu._usable(False))"
    environment = without_a_gpu | {"PATH": "/nowhere", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("CC", None)
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.stdout.strip() == "False", done.stderr
    assert "Triton cannot start a kernel here (" in done.stderr
    assert "C compiler" in done.stderr


@pytest.mark.parametrize("arch", [80, 90])
def test_the_compiler_spills_nothing_and_loads_16_bytes_at_once(
    without_a_gpu: dict[str, str], tmp_path: Path, arch: int
) -> None:
    out = tmp_path / "kernels.json"
    command = [sys.executable, "benchmarks/kernels.py", "--arch", str(arch), "--cells", "1", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=without_a_gpu | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["kernel"] for row in rows} >= {"sums", "normalize", "gradient_sums", "input_gradient", "merge"}
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= 99 << 10, row  # what a program may have on any GPU since Ampere
        if row["kernel"] in ("sums", "normalize", "gradient_sums", "input_gradient"):
            assert row["wide"] >= 4, row
            assert row["side_by_side"] >= 2, row
