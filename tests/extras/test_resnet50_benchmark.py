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


def test_a_candidate_that_breaks_while_it_is_timed_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    benchmark = importlib.import_module("resnet50")
    steps = iter(range(4))

    def breaks(*_: object) -> tuple[object, float]:
        return (lambda: 1 / (3 - next(steps))), 1.0  # at the fourth step

    candidates = {"per-device": (lambda *_: (lambda: None, 1.0), None), "ours": (breaks, None)}
    monkeypatch.setattr(benchmark, "CANDIDATES", candidates)
    monkeypatch.setattr(benchmark.dist, "get_world_size", lambda: 1)
    row = benchmark.measure(list(candidates), "cpu", 2, 32, 0.0, benchmark.Console(quiet=True))
    assert row["per-device/per-device"][0] == 1
    assert "ours_images/s" not in row
    assert row["failed"]["ours"].startswith("ZeroDivisionError")
    monkeypatch.setattr(benchmark, "clock_of", lambda _: 1 / 0)
    row = benchmark.measure(list(candidates), "cpu", 2, 32, 0.0, benchmark.Console(quiet=True))
    assert row["failed"]["everything"].startswith("ZeroDivisionError")
    benchmark.table(row)


def test_a_run_leaves_results(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--size", "32", "--batch", "4", "--seconds", "0", "--candidates"]
    command = [sys.executable, str(SCRIPT), *options, "per-device", "ours fused", "--out", str(tmp_path / "result")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert "not measured" in run.stdout  # the goal, at another batch and on another device
    (row,) = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["rows"]
    assert row["ours fused/per-device"][0] > 0
    assert (tmp_path / "result.png").stat().st_size > 10_000
