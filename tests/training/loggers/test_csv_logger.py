"""One metrics.csv per run: it grows in rows and columns, survives a kill, and is cut back."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from syncbn.training.loggers.csv_logger import MetricsFile, read
from tests.training.support.full_disk import fill_disk_for

ROWS = [({"loss": 0.1, "lr": 0.5}, 0), ({"val/acc": 1 / 3, "epoch": 0}, 4), ({"loss": 2.5e-7, "a,b": -1.0}, 9)]


def test_the_file_is_the_one_that_lightning_writes(tmp_path: Path) -> None:
    ours, theirs = MetricsFile(tmp_path / "ours"), CSVLogger(tmp_path, name="", version="theirs")
    (tmp_path / "ours").mkdir()
    for metrics, step in ROWS:
        for logger in (ours, theirs):
            logger.log_metrics(metrics, step)
    theirs.save()
    assert ours.path.read_bytes() == (tmp_path / "theirs/metrics.csv").read_bytes()


def test_a_row_is_in_the_file_when_the_call_returns_and_values_come_back_exactly(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for number, (metrics, step) in enumerate(ROWS, 1):
        file.log_metrics(metrics, step)
        assert file.rows() == number
        found = {name: float(value) for name, value in read(file.path)[-1].items() if value}
        assert found == metrics | {"step": step}
    file.log_metrics({"loss": torch.tensor(0.25)}, 10)  # type: ignore[dict-item]
    assert read(file.path)[-1]["loss"] == "0.25"


def test_it_goes_on_where_it_was_with_columns_of_before_and_new_ones(tmp_path: Path) -> None:
    for metrics, step in ROWS:
        MetricsFile(tmp_path).log_metrics(metrics, step)  # each as a process of its own would
    rows = read(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["0", "4", "9"]
    assert [row["lr"] for row in rows] == ["0.5", "", ""]
    assert MetricsFile(tmp_path).rows() == 3


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_last_line_that_was_written_by_half_is_dropped(tmp_path: Path, cut: int) -> None:
    file = MetricsFile(tmp_path)
    for step in range(3):
        file.log_metrics({"loss": 0.125}, step)
    os.truncate(file.path, file.path.stat().st_size - cut)
    assert [row["step"] for row in read(file.path)] == ["0", "1"]
    again = MetricsFile(tmp_path)
    assert again.rows() == 2
    again.log_metrics({"loss": 0.5}, 2)
    assert [(row["step"], row["loss"]) for row in read(file.path)] == [("0", "0.125"), ("1", "0.125"), ("2", "0.5")]


def test_a_header_written_by_half_is_no_file_yet(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("lo", encoding="utf-8")
    file = MetricsFile(tmp_path)
    assert file.rows() == 0
    file.log_metrics({"loss": 1.0}, 0)
    assert read(file.path) == [{"loss": "1.0", "step": "0"}]


def test_it_is_cut_back_to_a_number_of_rows_but_for_earlier_steps(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for metrics, step in ROWS:
        file.log_metrics(metrics, step)
    before = file.path.read_bytes()
    for rows, step in ((3, 0), (5, 0), (1, 10)):
        file.cut(rows, step)
        assert file.path.read_bytes() == before
    file.cut(1, 5)
    assert file.rows() == 2
    file.log_metrics({"loss": 3.0}, 5)
    found = list(csv.DictReader(file.path.read_text(encoding="utf-8").splitlines()))
    assert [(row["step"], row["loss"]) for row in found] == [("0", "0.1"), ("4", ""), ("5", "3.0")]
    assert float(found[1]["val/acc"]) == 1 / 3
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_without_a_file_nothing_is_cut_and_none_is_made(tmp_path: Path) -> None:
    MetricsFile(tmp_path).cut(0, 0)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_killed_process_leaves_all_its_rows(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal, pathlib; from syncbn.training.loggers.csv_logger import MetricsFile\n"
        "file = MetricsFile(pathlib.Path(sys.argv[1]))\n"
        "for step in range(50): file.log_metrics({'loss': step / 7, f'at{step // 20}': 1.0}, step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120).returncode == -9
    assert [float(row["loss"]) for row in read(tmp_path / "metrics.csv")] == [step / 7 for step in range(50)]


def test_a_row_that_is_logged_again_takes_the_place_of_an_earlier_attempts_unless_training_went_on(
    tmp_path: Path,
) -> None:
    first = MetricsFile(tmp_path)
    for metrics, step in ({"loss": 1.0}, 8), ({"test/acc": 0.25}, 9), ({"test/acc": 0.5, "loss": 2.0}, 9):
        first.log_metrics(metrics, step)
    again = MetricsFile(tmp_path)
    for _ in range(2):  # of this attempt's own rows none is taken out
        again.log_metrics({"test/acc": 0.75}, 9)
    assert again.rows() == 4
    found = [(row["step"], row["loss"], row["test/acc"]) for row in read(again.path)]
    assert found == [("8", "1.0", ""), ("9", "2.0", "0.5"), ("9", "", "0.75"), ("9", "", "0.75")]
    goes_on = MetricsFile(tmp_path)
    goes_on.cut(4, 9)
    goes_on.log_metrics({"loss": 1.0}, 8)
    assert goes_on.rows() == len(read(goes_on.path)) == 5


def test_new_columns_that_find_no_room_leave_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MetricsFile(tmp_path)
    file.log_metrics({"loss": 1.0}, 0)
    before = file.path.read_bytes()
    fill_disk_for(".metrics.csv", monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        file.log_metrics({"other": 1.0}, 1)
    assert list(tmp_path.iterdir()) == [file.path]
    assert file.path.read_bytes() == before
