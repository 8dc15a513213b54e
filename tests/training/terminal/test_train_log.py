"""``train.log`` holds what was printed, as plain text, and never ends a run."""

import logging
import os
import sys
from pathlib import Path

import pytest

from syncbn.training.console import print_line
from syncbn.training.launch import job
from syncbn.training.run_directory import symlinks
from syncbn.training.terminal import train_log
from syncbn.training.terminal.train_log import TrainLog, plain


def text(run_dir: Path) -> str:
    return (run_dir / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("plain ü", "plain ü"),
        ("\x1b[1mbold\x1b[0m \x1b[38;5;3mcolour\x1b[m", "bold colour"),
        ("\x1b]8;;https://x\x1b\\link\x1b]8;;\x1b\\ \x1b]0;title\x07end", "link end"),
        ("\r 10%|#   |\r 90%|### |", " 90%|### |"),
        ("\r\x1b[2K\r", ""),
        ("a\tb", "a       b"),
        ("bell\x07 \x9b1m", "bell\\x07 \\x9b1m"),
        ("\udcff", "\\udcff"),
    ],
)
def test_lines_are_plain_text(line: str, kept: str) -> None:
    assert plain(line) == kept


def test_what_is_printed_is_copied_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with train_log.copying() as log:
        print_line("before the run began")
        assert not list(tmp_path.iterdir())
        log.begin(tmp_path, "--- heading")
        print_line("error: no", error=True)
        print("in ", end="")
        print("two parts")
        assert logging.lastResort is not None
        logging.lastResort.emit(logging.makeLogRecord({"msg": "a record"}))  # where no handler is configured
        sys.stderr.writelines(["a\n", "b\n"])
        sys.stdout.write("without an end")
    print_line("afterwards")
    assert text(tmp_path).splitlines() == [
        *("--- heading", "before the run began", "error: no", "in two parts", "a record", "a", "b", "without an end")
    ]
    printed = capsys.readouterr()
    assert printed.out == "before the run began\nin two parts\nwithout an endafterwards\n"
    assert printed.err == "error: no\na record\na\nb\n"


def test_a_bar_that_is_drawn_again_for_hours_needs_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = []
    monkeypatch.setattr(train_log, "plain", lambda line: (lengths.append(len(line)), plain(line))[1])
    with train_log.copying() as log:
        log.begin(tmp_path)
        for number in range(2_000):
            sys.stderr.write(f"\r{number} of 2000 {'#' * 60}")
        print(file=sys.stderr)
        print("x" * 30_000)  # a long line without a carriage return is kept
    bar, line = text(tmp_path).splitlines()
    assert bar.startswith("1999 of 2000")
    assert line == "x" * 30_000
    assert lengths[0] < 20_000


def test_a_command_that_begins_no_run_leaves_no_file(tmp_path: Path) -> None:
    with train_log.copying():
        print_line("error: refused")
    assert not list(tmp_path.iterdir())


def test_a_second_attempt_appends(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with train_log.copying() as log:
            log.begin(tmp_path, train_log.heading(attempt, "python train.py"))
            print_line(f"line {attempt}")
    lines = text(tmp_path).splitlines()
    assert [line.partition(", ")[2] or line for line in lines] == [
        *("attempt 1: python train.py", "line 1", "attempt 2: python train.py", "line 2")
    ]


def test_other_ranks_add_their_error_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with train_log.copying(errors_only=True) as log:
        log.begin(tmp_path)
        print_line("said on every rank")
        print_line("error: rank 1 failed", error=True)
    assert text(tmp_path) == "error: rank 1 failed\n"


def test_nothing_is_written_through_a_link_or_into_a_pipe(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept", encoding="utf-8")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "train.log").symlink_to(elsewhere)
    train_log.append(run_dir, "a line")
    assert elsewhere.read_text(encoding="utf-8") == "kept"
    assert text(run_dir) == "a line\n"
    (run_dir / "train.log").unlink()
    os.mkfifo(run_dir / "train.log")
    train_log.append(run_dir, "a line")  # does not wait for a reader
    assert "train.log" in symlinks.APPENDED


def test_a_full_disk_or_a_missing_directory_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with train_log.copying() as log:
        log.begin(tmp_path)
        print_line("first")
        assert log._file is not None
        room = os.dup(log._file)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, log._file)
        print_line("lost")
        os.dup2(room, log._file)  # there is room again
        print_line("third")
        os.close(full)
        os.close(room)
    assert text(tmp_path) == "first\nthird\n"
    with train_log.copying() as log:
        log.begin(tmp_path / "missing")
        print_line("shown all the same")
    assert capsys.readouterr().out == "first\nlost\nthird\nshown all the same\n"


def test_a_line_that_was_cut_is_ended_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = TrainLog(), os.write
    log.begin(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:3]))
        log.add("cut off")
    log.add("whole")
    log.close()
    assert text(tmp_path) == "cut\nwhole\n"


def test_lines_of_two_processes_stay_whole(tmp_path: Path) -> None:
    children = []
    for letter in "ab":
        if not (pid := os.fork()):
            log = TrainLog()
            log.begin(tmp_path)
            for number in range(500):
                log.add(f"{letter * 50} {number}")
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    lines = text(tmp_path).splitlines()
    for letter in "ab":
        own = [line for line in lines if line.startswith(letter)]
        assert own == [f"{letter * 50} {number}" for number in range(500)]


def test_a_diverted_stream_is_copied_too_and_only_in_its_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Shown(list):
        def write(self, line: str) -> int:
            self.append(line)
            return len(line)

    shown = Shown()
    with train_log.copying() as log:
        log.begin(tmp_path)
        train_log.divert(shown)  # type: ignore[arg-type]
        print_line("above the bar")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_log.os, "getpid", lambda: -1)  # as in a data loader's worker
            print_line("in a worker")
        train_log.divert(None)
        print_line("below")
    assert "".join(shown) == "above the bar\n"
    assert capsys.readouterr().out == "in a worker\nbelow\n"
    assert text(tmp_path) == "above the bar\nin a worker\nbelow\n"


def test_the_heading_has_the_command(tmp_path: Path) -> None:
    command = job.Command("a", ["norm=local", "run.id=a b"], named=True)
    assert job._heading(tmp_path, command).endswith(" norm=local 'run.id=a b'")
    assert job._heading(tmp_path, command).partition(", ")[2].startswith("attempt 1: ")
