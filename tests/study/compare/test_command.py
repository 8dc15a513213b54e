"""Tests ``syncbn compare``: its output, the directory of the report, and its one-line errors."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

import syncbn.study.report
from syncbn.cli import app
from syncbn.study.compare.comparison import Comparison
from syncbn.study.report import terminal, write
from tests.study.support import comparisons, run_directories
from tests.study.support.page_reader import flat
from tests.study.support.run_directories import layer, sweep
from tests.training.support.train_command import train


class Pages:
    """Replaces the report and records the arguments of the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def write(self, comparison: Comparison, directory: Path) -> Path:
        self.calls.append(("write", comparison, directory))
        return directory / "report.html"

    def log_to_wandb(self, comparison: Comparison, directory: Path, mode: str) -> str:
        self.calls.append(("wandb", comparison, directory, mode))
        return "wandb sync it"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Pages:
    stub = Pages()
    for name in ("write", "wandb_run"):
        module = SimpleNamespace(write=stub.write, log_to_wandb=stub.log_to_wandb)
        monkeypatch.setitem(sys.modules, f"syncbn.study.report.{name}", module)
        monkeypatch.setattr(syncbn.study.report, name, module, raising=False)
    return stub


def compare(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_tables_fit_100_columns_and_say_all(here: Path, pages: Pages) -> None:
    local, sync = run_directories.by_seed([60.0, 62.5, 61.0, 64.0]), run_directories.by_seed([6.0, 6.5, 5.0, 7.0])
    for batch in (2, 16):
        errors = {"local": local, "sync": sync, "group_norm": sync, "local_mean": local}
        seen = [layer(f"network.layers.{i}.norm", effective_batch=batch) for i in range(12)]
        sweep(Path("multirun") / str(batch), errors, batch_size=batch, layers=seen, collectives=0.4)
    run_directories.run(Path("multirun/failed"), norm="sync", seed=7, status="failed", error=None)
    done, full = compare("multirun"), compare("multirun", "--details")
    assert done.exit_code == full.exit_code == 0, done.output
    lines, text = done.stdout.splitlines(), flat(done.stdout)
    assert max(map(len, (*lines, *full.stdout.splitlines()))) <= 100
    assert lines[0] == "norm: group_norm, sync, local_mean, local"
    assert lines[2].startswith("With 2 ")
    (row,) = [line for line in lines if line.startswith(" 2 ")]
    assert "✓ −55.8" in row
    assert "[−57.8, −53.7]" in text
    loud = text.index("What to know before believing it: ")
    assert "Time per step relative to local" in text[:loud]
    assert "! multirun/failed (sync, data.batch_size=2, seed 7): it failed" in text[loud:]
    assert "network.layers.0.norm" not in text
    assert "33 runs, 32 of them finished, 32 of them in pairs" in full.stdout.splitlines()
    rows = [line.split() for line in full.stdout.splitlines() if line.split()[:3] == ["2", "sync", "4"]]
    assert (" ".join(rows[0][3:6]), rows[0][-1]) == ("−55.8 [−57.8, −53.7]", "lower")
    assert "61.88 ± 1.8 (4)" in full.stdout
    assert "network.layers.0.norm" in full.stdout
    assert "and 16 more" in full.stdout
    assert "broadcasts the running statistics from rank 0" in flat(full.stdout)
    assert lines[-1] == "report: multirun/compare/report.html"
    what, comparison, directory = pages.calls[0]
    assert (what, directory) == ("write", here / "multirun/compare")
    assert comparison.command == "syncbn compare multirun"


@pytest.mark.usefixtures("here")
def test_a_difference_that_is_there_and_small_is_called_both() -> None:
    local = run_directories.by_seed([2.0, 2.1, 2.2, 2.0, 1.9, 2.1, 2.0, 2.2])
    sync = {seed: error - 0.1 - 0.01 * (seed % 3) for seed, error in local.items()}
    done = compare(sweep(Path("runs"), {"local": local, "sync": sync}), "--no-report", "--details")
    assert [line for line in done.stdout.splitlines() if re.fullmatch(r"\s*sync .*lower, within\s*", line)]
    assert "(by less than ±0.75 points)" in flat(done.stdout)
    assert "✓= " in done.stdout


@pytest.mark.parametrize(("runs", "line"), [(1, "1 run in one process was"), (2, "2 runs in one process were")])
@pytest.mark.usefixtures("here")
def test_confirmations_are_counted(runs: int, line: str) -> None:
    sweep(Path("runs"), {"local": {0: 2.0, 1: 2.1}, "sync": {0: 2.0, 1: 2.2}}, simulate=2)
    sweep(Path("runs"), {"sync": dict.fromkeys(range(runs), 2.5)})
    done = compare("runs", "--no-report", "--details")
    assert f"\n{line} confirmed by processes: at most 0.5 points apart\n" in done.stdout


def test_a_table_says_whose_tolerances_are(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(comparisons.rich(), Console(), details=True)
    assert "published or expected figures (± is a tolerance of ours)" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_options(pages: Pages) -> None:
    sweep(Path("a b"), {"local": {0: 2.0, 1: 2.1, 2: 2.5}, "sync": {0: 2.0, 1: 2.3, 2: 2.4}})
    options = ("--factor=norm.name,norm.group", "--baseline=sync", "--metric=test/loss", "--margin=0.5")
    done = compare("a b", *options, "--alpha=0.05", "--report=pages", "--wandb=offline")
    assert done.exit_code == 0, done.output
    (_, comparison, directory), logged = pages.calls
    assert directory == Path("pages")
    assert (comparison.baseline, comparison.metric.name) == ("sync", "test/loss")
    assert (comparison.margin, comparison.alpha) == (0.5, 0.05)
    assert logged == ("wandb", comparison, directory, "offline")
    assert "W&B: wandb sync it" in done.stdout
    words = "--baseline sync --metric test/loss --margin 0.5 --alpha 0.05"
    assert comparison.command == f"syncbn compare 'a b' --factor norm.name,norm.group {words}"
    assert compare("a b", "--no-report").exit_code == 0
    assert len(pages.calls) == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gone"], "error: RUNS=gone: there is no such directory; "),
        (["runs", "--factor=model"], "error: --factor=model: all runs have MLP; "),
        (["runs", "--wandb=on"], "error: --wandb=on: use offline or online"),
    ],
)
@pytest.mark.usefixtures("here")
def test_one_line_where_it_cannot(pages: Pages, arguments: list[str], line: str) -> None:
    sweep(Path("runs"), {"local": {0: 2.0}, "sync": {0: 2.0}})
    done = compare(*arguments)
    assert (done.exit_code, done.stdout, pages.calls) == (1, "", [])
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_report_is_written_again_by_its_directory(tmp_path: Path) -> None:
    write.write(comparisons.without_axis(), tmp_path)
    before = (tmp_path / "report.md").read_bytes()
    (tmp_path / "report.md").unlink()
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/report.html\n")
    assert (tmp_path / "report.md").read_bytes() == before
    done = CliRunner().invoke(app, ["report", str(tmp_path / "plots")])
    line = f"error: DIRECTORY={tmp_path}/plots: there is no report in it; syncbn compare writes one\n"
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", line)
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()  # in the way
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"error: DIRECTORY={tmp_path}: ")


def test_a_real_sweep(here: Path, pages: Pages) -> None:
    quick = ("model=mlp", "debug=fast", "logger=csv", "data.batch_size=2", "hydra.sweep.dir=multirun/a")
    trained = train(here, "-m", "norm=local,sync", "seed=0,1", *quick)
    assert trained.code == 0, trained.err
    done = compare("multirun/a")
    assert done.exit_code == 0, done.output
    ((_, c, directory),) = pages.calls
    assert directory == here / "multirun/a/compare"
    results = [json.loads((here / f"multirun/a/{n}/result.json").read_text(encoding="utf-8")) for n in range(4)]
    errors = [100 * (1 - result["test"]["test/acc"]) for result in results]
    assert c.runs["value"].tolist() == pytest.approx(errors)
    assert c.runs["side"].tolist() == ["local", "local", "sync", "sync"]
    assert c.effects["differences"][0] == pytest.approx((errors[2] - errors[0], errors[3] - errors[1]))
    assert c.effects["how"].tolist() == ["2 processes on the CPU"]
    assert c.cost["images_per_second"][0] == pytest.approx(sum(r["images_per_second"] for r in results[:2]) / 2)
    assert set(c.curves["metric"]) == {"train/loss", "val/error"}
    assert "samples that share statistics: 2 / 4" in c.differs
    assert "differ in more" not in done.stdout
