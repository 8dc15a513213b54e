"""The benchmarks run; what they measure is for those who run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "part", "measured"),
    [
        (
            "layer.py --device cpu --seconds 0 --parts one_process",
            "one_process",
            {"per-device", "ours", "textbook", "floor"},
        ),
        ("collectives.py --rounds 5 --ranks 2", "rows", {"ours", "gathered"}),
    ],
)
def test_a_benchmark_prints_a_table_and_leaves_results(
    arguments: str, part: str, measured: set[str], tmp_path: Path
) -> None:
    script, *options = arguments.split()
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--out", str(tmp_path / "result")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert run.returncode == 0, run.stderr
    assert "ours" in run.stdout
    assert (tmp_path / "result.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["machine"]["torch"]
    for row in result[part]:
        assert {key.removesuffix("_us") for key in row if key.endswith("_us")} == measured
        assert all(0 < low <= median <= high for median, low, high in (row[f"{name}_us"] for name in measured))
