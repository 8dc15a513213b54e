"""What is printed can be read and does no more: no escape sequence, no second line, no turned direction, no markup."""

import ast
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from syncbn.cli import app
from syncbn.training.console import cell, print_line, printable
from syncbn.training.launch import job, outcome, summary
from syncbn.training.processes.rank_processes import End
from tests.study.support import run_directories

REPO = Path(__file__).resolve().parents[1]
# Colours, a title, a cleared screen, an 8-bit CSI, line breaks of all kinds, bidirectional marks, rich's markup.
NASTY = (
    "\x1b[31mred\x1b]0;title\x07\x1b[2J\x9b1m\r\n\x0b\x0c\x85\u2028\u2029\x00\x7f\u202e\u2066\u200f[bold]b[/][/red]:x:"
)
SEEN = "[31mred]0;title[2J1m[bold]b[/][/red]:x:"  # what of it is letters and signs


def is_harmless(text: str) -> bool:
    return all(each.isprintable() or each == "\n" for each in text)


def letters(text: str) -> str:
    """Without escapes, and without line breaks, which tables make in long words."""
    for each in set(NASTY):
        if not each.isprintable():
            text = text.replace(each.encode("unicode_escape").decode(), "")
    return text.replace("\n", "")


@pytest.mark.parametrize("each", sorted({each for each in NASTY if not each.isprintable()} | {"\udc80", "\t"}))
def test_what_is_no_letter_becomes_an_escape(each: str) -> None:
    shown = printable(f"a{each}b")
    assert shown.isascii()
    assert shown.isprintable()
    assert ast.literal_eval(f"'{shown}'") == f"a{each}b"
    assert printable(shown) == shown


@pytest.mark.parametrize(
    "text", ["", "a b", "± — − µ", "Müller", "日本", "a\u00a0b\u202f%", r"C:\new", "[/red]", "100 %"]
)
def test_letters_signs_and_spaces_stay(text: str) -> None:
    assert printable(text) == text


def test_a_line_is_a_line_and_a_cell_has_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(NASTY)
    print_line(NASTY, error=True)
    for printed in capsys.readouterr():
        assert printed == f"{printable(NASTY)}\n"
        assert letters(printed) == SEEN
    assert cell(NASTY).plain == printable(NASTY)
    assert cell(NASTY).spans == []


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_there_is_one_place_that_prints() -> None:
    """So a new message needs no thought: ``print`` is called in one module, and rich gets nothing but cells."""
    modules = [path for path in (REPO / "syncbn").rglob("*.py") if path.name != "console.py"]
    assert len(modules) > 100
    for path in modules:
        for name, call in calls(path):
            at = f"{path.relative_to(REPO)}:{call.lineno}"
            assert name not in ("print", "sys.stdout.write", "sys.stderr.write", "Text.from_markup", "rich.print"), at
            if name == "Text":
                assert ast.unparse(call) == r"Text('\n')", at  # between cells
            if name == "console.print" and call.args:
                (given,) = call.args
                assert not isinstance(given, ast.Constant | ast.JoinedStr), at
                assert ast.unparse(given).startswith(("cell(", "table", "summary.summary(")), at


def test_errors_and_what_ranks_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job._print_error(f"error: {NASTY}")
    job.print_line(NASTY)
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks/0.log").write_text(f"before\n{NASTY}\n", encoding="utf-8")
    error = {"kind": "ValueError", "message": NASTY, "trace": f"Traceback\n  {NASTY}\n", "place": f"{NASTY}:1"}
    ended = outcome.of([End(0, 1, 1, error)], [], tmp_path, "")
    job._print_error(ended.message)
    printed = capsys.readouterr()
    assert is_harmless(printed.out + printed.err)
    assert printed.out.count("\n") == 1
    assert printed.err.splitlines()[-1].startswith("rank 0 of 1 (pid 1) failed: ValueError: ")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's directory whose files hold what none of ours would."""
    monkeypatch.chdir(tmp_path)
    for number, value in enumerate([NASTY, "plain"]):
        where = run_directories.run(tmp_path / "sweep" / str(number), seed=number, error=3.0 + number)
        (where / ".hydra").mkdir()
        overrides = [f"model.kind={value}", f"+{NASTY}={value}"]
        (where / ".hydra/overrides.yaml").write_text(yaml.safe_dump(overrides), encoding="utf-8")
        result = json.loads((where / "result.json").read_text(encoding="utf-8"))
        result["test"][f"test/{NASTY}"] = 1.0 + number
        (where / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return tmp_path / "sweep"


def test_the_table_of_a_sweep(jobs: Path) -> None:
    done = CliRunner().invoke(app, ["table", str(jobs)])
    assert done.exit_code == 0, done.output
    assert is_harmless(done.output)
    table = [line for line in done.stdout.splitlines() if printable(NASTY) in line or "plain" in line]
    assert len(table) == 3  # the heading, and a line for each job
    with (jobs / "sweep.csv").open(newline="", encoding="utf-8") as file:
        lines = file.read()
    assert is_harmless(lines.replace("\r\n", "\n"))
    assert len(lines.splitlines()) == 3
    assert [row["model.kind"] for row in csv.DictReader(lines.splitlines())] == [printable(NASTY), "plain"]


def test_the_summary_of_a_run(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = jobs / "0"
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(about | {"tests": f"{NASTY}.ckpt", "wandb_id": "a"}), encoding="utf-8")
    (run / "wandb.json").write_text(json.dumps({"url": f"https://{NASTY}"}), encoding="utf-8")
    Console(width=1000, soft_wrap=True, highlight=False).print(summary.summary(run))
    printed = capsys.readouterr().out
    assert is_harmless(printed)
    assert printed.count("title") == 3  # the checkpoint, the metric, the address


def test_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def runs(value: str, at: int) -> None:
        for seed in range(3):
            settings: dict[str, Any] = {"model.kind": value, f"data.{NASTY}": NASTY}
            run_directories.run(
                tmp_path / f"runs/{at}-{seed}", seed=seed, error=3.0 + at + 0.1 * seed, settings=settings
            )

    runs(NASTY, 0)
    runs("plain", 1)
    failed = run_directories.run(tmp_path / "runs/failed", seed=9, status="failed", error=None)
    (failed / "error.txt").write_text(f"Traceback\nValueError: {NASTY.splitlines()[0]}", encoding="utf-8")
    done = CliRunner().invoke(app, ["compare", "runs", "--factor", "model.kind", "--baseline", "plain"])
    assert done.exit_code == 0, done.output
    assert is_harmless(done.output)
    assert SEEN in letters(done.output).replace(" ", "")
    for file in (tmp_path / "runs/compare").rglob("*.*"):
        if file.suffix in (".html", ".md", ".csv", ".svg"):
            assert is_harmless(file.read_text(encoding="utf-8")), file
    wrong = CliRunner().invoke(app, ["compare", f"runs/{NASTY.replace(chr(0), '')}"])
    assert wrong.exit_code == 1
    assert is_harmless(wrong.output)
    assert wrong.output.count("\n") == 1
