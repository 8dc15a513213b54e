"""The table at the end has every metric of the test, and paths that a shell takes."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from syncbn.training.launch import summary
from syncbn.training.run_directory import record
from syncbn.training.terminal import metric_rows
from syncbn.training.terminal.result_table import ResultTable


def drawn(table: object, width: int = 80, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=out, width=width, soft_wrap=True, highlight=False).print(table)
    out.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_each_metric_has_a_row() -> None:
    result = {
        "test": {"test/loss": 0.5, "test/acc": 0.25, "test/count": 360.0, "test/f1": 0.5, "auroc": 1.0, "n": 1234.0},
        "precise": {"precise/acc": 0.5, "precise/f1": 0.5},
        "fit": {"fit/iou": 0.125},
    }
    assert metric_rows.rows(result) == [
        *[("auroc", "1.0000"), ("n", "1,234"), ("test/f1", "0.5000"), ("fit/iou", "0.1250")]
    ]
    assert metric_rows.rows({"test": {"test/count": 3.0, "x": float("nan")}}) == [("test/count", "3"), ("x", "nan")]
    assert metric_rows.rows({}) == []


@pytest.mark.parametrize("width", [20, 40, 80, 1000])
def test_no_value_is_cut_and_none_is_broken(width: int) -> None:
    path = "outputs/" + "a" * 100
    lines = drawn(ResultTable([("run directory", path), ("x", "[red]1[/red]")]), width)
    assert lines[1:3] == [f"  run directory   {path}", "  x               [red]1[/red]"]
    assert lines[0] == lines[3]
    assert set(lines[0].strip()) == {"─"}
    assert len(lines[0]) < min(width, 80)


def test_a_terminal_without_lines_gets_hyphens() -> None:
    assert set(drawn(ResultTable([("a", "b")]), encoding="ascii")[0].strip()) == {"-"}


@pytest.mark.parametrize("below", [True, False])
def test_the_wandb_row_is_the_path_that_is_uploaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: bool
) -> None:
    run_dir, elsewhere = tmp_path / "outputs/a", tmp_path / "elsewhere"
    attempt = run_dir / "wandb/offline-run-20260101_000000-id1"
    for directory in (attempt, elsewhere):
        directory.mkdir(parents=True)
    (attempt / "run-id1.wandb").write_bytes(bytes(100))
    record.write(run_dir, "run", {"status": "finished", "wandb_id": "id1"})
    record.write(run_dir, "wandb", {"id": "id1", "url": None})
    record.write(run_dir, "result", {"seconds": 1.0, "epochs": 1, "steps": 2, "test": {"mine": 42.0}})
    monkeypatch.chdir(tmp_path if below else elsewhere)
    monkeypatch.setattr(summary.wandb_files.wandb_internals, "has_records", lambda _: True)
    lines = drawn(summary.summary(run_dir), 1000)
    (row,) = [line.split()[-1] for line in lines if line.startswith("  W&B run")]
    assert lines[-1].endswith(f" sync {row}")
    assert row == ("outputs/a/wandb/offline-run-20260101_000000-id1" if below else str(attempt))
    assert "  mine            42" in lines
    assert "  training        1.0 s, 1 epoch, 2 steps" in lines
