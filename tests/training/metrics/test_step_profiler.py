"""The table of debug=profile; a run with it is in tests/training/launch/test_train.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncbn.nn.comm import all_reduce
from syncbn.training.metrics.step_profiler import GRADIENTS, LAYERS, Row, StepProfiler, rows_of, table
from tests.support.refuses import refuses


def event(key: str, count: int, own: float, total: float = 0.0, gpu: float = 0.0) -> Any:
    times = {"self_cpu_time_total": own, "cpu_time_total": total or own, "self_device_time_total": gpu}
    return SimpleNamespace(key=key, count=count, **times)


def test_the_all_reduces_of_the_layers_have_one_row_with_what_they_call() -> None:
    events = [
        event("ProfilerStep#4", 1, 5),
        event("lightning/run_training_batch", 1, 5),
        event("syncbn::allreduce in a process group, [9] of double", 4, 1e6, 4e6),
        event("syncbn::allreduce in a process group, [17] of double", 2, 1e6, 3e6),
        event("c10d::allreduce_", 7, 6e6),
        event("syncbn::averaging gradients in shared memory, [100] of float", 1, 2e6),
        event("aten::mm", 8, 3e6, 9e6),
    ]
    found = {row.name: row for row in rows_of(SimpleNamespace(key_averages=lambda: events))}
    assert found[LAYERS] == Row(LAYERS, 6, 7.0, 0.0)
    assert found["c10d::allreduce_"] == Row("c10d::allreduce_", 1, 1.0, 0.0)
    assert found[GRADIENTS].cpu == 2.0
    assert found.keys() == {LAYERS, GRADIENTS, "c10d::allreduce_", "aten::mm"}


def test_the_layers_row_is_there_although_it_is_short() -> None:
    rows = [Row("aten::mm", 8, 3.0, 0.0), Row("aten::add", 8, 2.0, 0.0), Row(LAYERS, 2, 0.1, 0.0)]
    lines = table(rows, steps=2, most=1)
    assert [line.split("  ")[0] for line in lines[2:]] == ["aten::mm", LAYERS, "all 3 operators"]
    assert lines[2].split()[1:] == ["4", "1500.000", "58.8"]
    on_gpu = table([*rows, Row("kernel", 2, 0.0, 4.0)], steps=2, most=1)
    assert on_gpu[2].split()[0] == "kernel"
    assert on_gpu[1].endswith("GPU ms   GPU %")


def test_a_layers_all_reduce_through_a_process_group_is_named(ranks: Any) -> None:
    ((names, _), _) = ranks.run(on_a_rank, world_size=2)
    assert names == ["syncbn::allreduce in a process group, [9] of double"]


def on_a_rank(rank: int, world_size: int) -> tuple[list[str], int]:
    group = all_reduce.partners("world")
    assert group is not None
    with torch.profiler.profile() as recorded:
        all_reduce.all_sum(torch.ones(9), group, "layer")  # float32: shared memory takes doubles alone
    return [each.key for each in recorded.key_averages() if each.key.startswith("syncbn")], rank


def test_a_training_that_is_too_short_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    profiler = StepProfiler(str(tmp_path), wait=3, warmup=1, active=2)
    for _ in range(4):
        with profiler.profile("run_training_batch"):
            torch.ones(3).sum()
    profiler.teardown("fit")
    assert "ended after 4 steps, and a profile needs 6" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("wait", -1), ("warmup", 0), ("active", 0), ("rows", "x")])
def test_numbers_that_cannot_work(name: str, value: object) -> None:
    with refuses(f"trainer.profiler.{name}", value, "whole number"):
        StepProfiler("somewhere", **{name: value})  # type: ignore[arg-type]
