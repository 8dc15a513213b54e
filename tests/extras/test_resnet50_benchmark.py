"""benchmarks/resnet50.py runs; what it measures is for those who run it, on a GPU."""

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resnet50.py"


def test_the_fused_network_computes_what_torchvisions_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    benchmark = importlib.import_module("resnet50")
    torch.manual_seed(0)
    model, x = benchmark.resnet50().double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(benchmark.fused(copy.deepcopy(model))(x), model(x))


def test_a_run_leaves_results(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--size", "32", "--batch", "4", "--seconds", "0", "--candidates"]
    command = [sys.executable, str(SCRIPT), *options, "per-device", "ours fused", "--out", str(tmp_path / "result")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert run.returncode == 0, run.stderr
    assert "not measured" in run.stdout  # the goal, at another batch and on another device
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert row["ours fused/per-device"][0] > 0
    assert (tmp_path / "result.png").stat().st_size > 10_000
