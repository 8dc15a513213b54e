"""Tests ``+study=NAME`` as a user calls it."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from tests.training.support.faulty_runs import fault
from tests.training.support.train_command import Run, train

STUDY = ["+study=small_batch", "study.budget=smoke", "study.seeds=1", "trainer.max_epochs=1", "precise_batches=2"]
STUDY += ["+trainer.limit_test_batches=2", "~study.parts.fixed_step", "study.directory=s", "logger=csv"]


def of_study(where: Path, *more: str) -> Run:
    return train(where, *STUDY, *more)


def written(where: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted((where / "s").glob("*/*/*/*/result.json"))}


class Repeated(NamedTuple):
    """A study in which one run was killed, and which the same command then completed.

    Attributes:
        where: the directory of both calls.
        stop: the setting that killed the run; it is part of both commands.
        first: the call with the killed run.
        done: the results after it.
        again: the call that completed the study.
    """

    where: Path
    stop: str
    first: Run
    done: dict[Path, int]
    again: Run


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Repeated:
    where = tmp_path_factory.mktemp("repeated")
    stop = fault(where, "kill")
    first = of_study(where, stop)
    return Repeated(where, stop, first, written(where), of_study(where, stop))


def test_it_does_what_is_missing(repeated: Repeated) -> None:
    """A killed run is reported and listed. The same command then repeats only that run."""
    where, _, first, done, again = repeated
    assert first.code == 1
    assert "was killed by SIGKILL, perhaps for lack of memory (see dmesg); the same command resumes it" in first.err
    assert first.err.splitlines()[-1] == "error: 1 of 6 runs failed; the same command does them again"
    assert "5 of 6 runs (1 failed)" in first.out
    assert len(done) == 5
    assert again.code == 0, again.err
    assert len(written(where)) == 6
    assert {path: written(where)[path] for path in done} == done
    assert not again.left
    assert "6 of 6 runs" in again.out
    other = of_study(where, "trainer.max_epochs=2")
    assert other.code == 1
    assert other.err.startswith("error: study.directory=s: its runs were made with other settings (")
    assert "trainer.max_epochs=1 -> 2" in other.err
    assert {path: written(where)[path] for path in done} == done
    status = [json.loads(path.read_text(encoding="utf-8"))["status"] for path in (where / "s").glob("*/*/*/*/run.json")]
    assert status == ["finished"] * 6


def test_the_report_is_of_the_runs_that_are_there(repeated: Repeated) -> None:
    """Without one of the runs, which is put back afterwards, the report is another."""
    where = repeated.where
    page = where / "s" / "report" / "report.html"
    before = page.read_text(encoding="utf-8")
    check_tables(page.parent / "scaled_step-test-acc", rounding=7)  # a test image is 3.1
    gone = where / "s" / "scaled_step" / "8" / "sync" / "0"
    kept = where / "kept"
    shutil.move(gone, kept)
    try:
        run = of_study(where, repeated.stop, "study.report_only=true")
    finally:
        shutil.move(kept, gone)
    assert run.code == 0, run.err
    assert page.read_text(encoding="utf-8") != before


def test_it_lists_its_runs(tmp_path: Path) -> None:
    run = of_study(tmp_path, "study.dry_run=true")
    lines = run.out.splitlines()
    assert run.code == 0
    assert lines[-1] == "study small_batch, budget smoke: 6 runs: 4 of 1 process, 2 of 2 processes"
    assert lines[0].startswith("python train.py model=mlp trainer.accelerator=cpu simulate=2 ")
    assert lines[0].endswith(" norm=local seed=0 hydra.run.dir=s/scaled_step/2/local/0")
    assert not (tmp_path / "s" / "scaled_step").exists()
    assert train(tmp_path, *lines[0].split()[2:]).code == 0


def test_nonsense_is_one_line(tmp_path: Path) -> None:
    for setting, line in {
        "study.budget=tiny": "error: study.budget=tiny: use one of smoke, default, full",
        "model=missing": "error: model=missing: there is no such choice; there are deeplab, mlp, resnet",
        "optimizer.momentum=-1": "error: optimizer.momentum=-1: use a number, 0 or more",
    }.items():
        run = of_study(tmp_path, setting)
        assert run.code == 1
        assert run.err.startswith(line)


def test_a_whole_study(tmp_path: Path) -> None:
    """The study as in docs/guide/studies.md, without the second part, whose runs are those of the other tests."""
    settings = ("+study=small_batch", "study.budget=smoke", "~study.parts.scaled_step")
    run = train(tmp_path, *settings, timeout=170)
    assert run.code == 0, run.err
    assert "report: studies/small_batch-smoke/report/report.html" in run.out
    assert run.out.count("W&B: wandb sync ") == 2
    # Points; rounding grows, and a test image is 0.16.
    check_tables(tmp_path / "studies" / "small_batch-smoke" / "report" / "fixed_step-test-acc", rounding=3)


def check_tables(comparison: Path, rounding: float) -> None:
    """Checks the comparison at 2 samples per device, one process against two, and the costs."""
    effects = pd.read_csv(comparison / "tables" / "effects.csv").set_index("condition")
    assert effects.loc["data.batch_size=2", "difference"] < -20
    assert set(effects["how"]) == {"1 process for 2 devices"}
    confirmed = pd.read_csv(comparison / "tables" / "confirmations.csv")
    assert set(confirmed["side"]) == {"local", "sync"}
    assert confirmed["difference"].abs().max() < rounding
    cost = pd.read_csv(comparison / "tables" / "cost.csv")
    assert set(cost["how"]) == {"2 processes on the CPU"}
