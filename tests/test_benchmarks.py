"""The benchmarks run; what they measure is for those who run them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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
        (
            "layer.py --device cpu --seconds 0 --parts cells",
            "cells",
            {"per-device", "ours", "ours by ATen", "ours relu", "ours add relu", "ours, add, relu", "copies"},
        ),
        ("collectives.py --rounds 5 --ranks 2", "rows", {"ours", "gathered"}),
        ("exchange.py --rounds 5 --ranks 2", "rows", {"ours", "gloo"}),
    ],
)
def test_a_benchmark_prints_a_table_and_leaves_results(
    arguments: str, part: str, measured: set[str], tmp_path: Path
) -> None:
    script, *options = arguments.split()
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--out", str(tmp_path / "result")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert "ours" in run.stdout
    assert part != "cells" or run.stdout.count(": bandw.") == 3  # no column cropped, of three tables
    assert script == "exchange.py" or (tmp_path / "result.png").stat().st_size > 10_000  # that one has no plot
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["machine"]["torch"]
    for row in result[part]:
        assert {key.removesuffix("_us") for key in row if key.endswith("_us")} == measured
        assert all(0 < low <= median <= high for median, low, high in (row[f"{name}_us"] for name in measured))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def goals(benchmark: Any) -> Any:
    return benchmark("layer_gpu_goals")


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("an illegal memory access was encountered")


def test_rows_outlive_what_comes_after_them(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layer, harness = benchmark("layer"), benchmark("harness")
    for module, name in ((harness, "keep_memory"), (layer.torch, "set_num_threads")):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(harness, "together", lambda _: (0, 1))
    monkeypatch.setattr(layer.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(layer.layer_gpu, "clock_of", lambda _: None)
    rows = iter([{"host": {}}])
    monkeypatch.setattr(layer.layer_gpu, "_row", lambda *_: next(rows))
    monkeypatch.setattr(layer.layer_gpu_report, "tables", raises)
    monkeypatch.setattr(sys, "argv", ["layer.py", "--device", "cpu", "--parts", "cells", "--out", str(tmp_path / "r")])
    with pytest.raises(RuntimeError, match="illegal"):
        layer.main()
    first, *others = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["cells"]
    assert first["host"] == {}
    assert ["everything" in row["failed"] for row in others] == [True] * 3


def test_launches_that_cannot_be_counted_are_a_reason_and_no_end(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, kept = benchmark("layer_gpu"), []
    monkeypatch.setattr(cells.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(cells, "clock_of", lambda _: None)
    monkeypatch.setattr(cells, "_row", lambda *_: {"host": {}, "failed": {}})
    monkeypatch.setattr(cells, "data_of", raises)
    some = cells.chosen("cpu", False)[:1]
    (row,) = cells.measure(some, dict, "cuda", 0.0, lambda _: None, keep=lambda rows: kept.append(len(rows)))
    assert "illegal" in row["failed"]["launches"]
    assert kept == [1, 1]


def test_results_stay_until_new_ones_are_complete(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    harness, path = benchmark("harness"), tmp_path / "result.json"
    harness.save(path, {"rows": [1]})
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, text, **how: write(self, text[:3], **how) and raises())
    with pytest.raises(RuntimeError):
        harness.save(path, {"rows": [1, 2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"rows": [1]}


def test_versions_are_those_of_what_imports(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, triton = benchmark("harness"), ModuleType("triton")
    triton.__version__ = "3.6.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    assert harness._triton() == "3.6.0"
    monkeypatch.setitem(sys.modules, "triton", None)  # there is none to import
    monkeypatch.setattr(harness.dist, "is_nccl_available", lambda: False)
    assert (harness._triton(), harness._nccl()) == ("none", "none")


BROKEN = {"shape": [2], "bytes": 2 * 10**8}


def cell(
    ratio: float,
    *,
    upper: float = 0.0,
    bandwidth: float = 0.9,
    fused: float = 0.9,
    host: float | None = None,
    megabytes: int = 200,
) -> Any:
    """A row in which ours takes ``ratio`` of torch's time, at most ``upper``, fused 0.6, and ``host`` of its host's.

    Ours reaches ``bandwidth``, and ``fused`` of it with a residual and a ReLU.
    """
    spread = [ratio, ratio - 0.1, upper or ratio + 0.1]
    row = {
        "shape": [256 if host is None else 2],
        "bytes": megabytes * 10**6,
        "ours/torch sync": spread,
        "ours_bandwidth": bandwidth,
        "ours add relu_bandwidth": fused,
    }
    row["ours add relu/torch sync, add, relu"] = [0.6, 0.5, 0.7]
    return row | ({} if host is None else {"host": {"ours/torch sync": [host, host, host]}})


def test_goals_are_met_where_every_figure_says_so(goals: Any) -> None:
    small = cell(0.9, bandwidth=0.2, fused=0.2, megabytes=2)
    rows = [cell(0.7), cell(0.75, host=0.4), small, {"skipped": "no room"}]
    assert [goal.verdict for goal in goals.of_layer(rows)] == ["met"] * 6


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        # Slower in the median, but within the spread: not slower beyond it.
        ([cell(1.05, host=0.4), cell(0.5), cell(0.5)], ["met"] * 6),
        ([cell(1.3, host=0.4), cell(0.5), cell(0.5)], ["not met", *["met"] * 5]),
        ([cell(0.8, host=0.6, bandwidth=0.8)], ["met", *["not met"] * 3, "met", "met"]),
        ([cell(0.7, host=0.4), cell(0.7, fused=0.8)], [*["met"] * 5, "not met"]),
        # What could not be measured leaves a goal open, unless something else is against it.
        ([cell(0.7), BROKEN], ["not measured"] * 6),
        ([cell(1.3), BROKEN], ["not met", *["not measured"] * 5]),
        ([], ["not measured"] * 6),
    ],
)
def test_a_goal_is_judged_by_all_cells(goals: Any, rows: list[Any], verdicts: list[str]) -> None:
    assert [goal.verdict for goal in goals.of_layer(rows)] == verdicts


def test_the_goal_of_the_training_step_is_about_the_large_batch(goals: Any) -> None:
    small = {"batch": 32, "ours/per-device": [0.5, 0.5, 0.5]}
    (good,) = goals.of_training([small, {"batch": 256, "ours/per-device": [0.98, 0.9, 1.0]}])
    (bad,) = goals.of_training([small, {"batch": 256, "ours/per-device": [0.96, 0.9, 1.0]}])
    (open_,) = goals.of_training([small])
    assert [good.verdict, bad.verdict, open_.verdict] == ["met", "not met", "not measured"]
