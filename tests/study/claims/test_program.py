"""Tests ``+study=NAME`` for studies with claims, as a user calls it."""

import json
from pathlib import Path

import pytest

from tests.training.support.faulty_runs import fault
from tests.training.support.train_command import Run, train

OTHERS = "study=both consists of other studies"
CONF = Path(__file__).parent / "conf"


def of(where: Path, name: str, *overrides: str) -> Run:
    given = ("study.budget=smoke", "study.directory=s", "logger=csv", *overrides)
    return train(where, "--config-dir", str(CONF), f"+study={name}", *given)


def results(where: Path) -> dict[str, int]:
    found = (where / "s").glob("*/only/**/result.json")
    return {str(path.parent.relative_to(where / "s")): path.stat().st_mtime_ns for path in found}


def test_a_study_of_two(tmp_path: Path) -> None:
    """A killed run is reported on the page, and the same command repeats only that run. Each study also runs alone."""
    listed = of(tmp_path, "both", "study.dry_run=true")
    assert listed.out.splitlines()[-1] == "study both, budget smoke: 4 runs: 4 of 1 process"
    assert "hydra.run.dir=s/smaller/only/sync/0" in listed.out
    stop = fault(tmp_path, "kill")
    first = of(tmp_path, "both", stop, "study.slots=1")
    assert first.code == 1
    assert first.err.splitlines()[-1] == "error: 1 of 4 runs failed; the same command does them again"
    done = results(tmp_path)
    assert len(done) == 3
    undecided = (
        "With synchronized batch norm, none of 2 claims holds, none fails, 1 is undecided (8) and 1 was not tested (7)."
    )
    assert undecided in first.out.splitlines()
    assert "only/none/0: it failed" in first.out
    assert list((tmp_path / "s" / "report").glob("*.html"))
    again = of(tmp_path, "both", stop)
    assert again.code == 0, again.err
    assert len(results(tmp_path)) == 4
    assert done.items() <= results(tmp_path).items()
    assert "failed" not in again.out
    records = [path.read_text(encoding="utf-8") for path in (tmp_path / "s").glob("*/only/**/run.json")]
    assert {json.loads(text)["status"] for text in records} == {"finished"}
    alone = of(tmp_path, "tiny", "study.directory=s/tiny", "study.report_only=true", stop)
    assert alone.code == 0, alone.err
    assert "With synchronized batch norm, the claim is undecided." in alone.out.splitlines()
    assert "The only part: test/loss" in alone.out
    assert (tmp_path / "s" / "tiny" / "report" / "report.html").exists()
    assert list((tmp_path / "s" / "tiny" / "report" / "claim").glob("*.html"))
    other = of(tmp_path, "both", stop, "trainer.max_epochs=2")
    assert other.code == 1
    assert other.err.startswith("error: study.directory=s: its runs were made with other settings (")


@pytest.mark.parametrize(
    ("name", "setting", "line"),
    [
        ("both", "study.title=x", f"study.title: {OTHERS}; set this for one of them, +study=tiny, or "),
        ("both", "study.studies=[small_batch]", "+study=small_batch: it has no claim (study.claim)"),
        ("both", "study.studies=[missing]", "+study=missing: In 'config': Could not find 'study/missing'"),
        ("both", "study.budget=tin", "+study=tiny: study.budget=tin: use one of smoke, default, full"),
        ("both", "model=missing", "model=missing: there is no such choice; there are deeplab, mlp, resnet"),
        ("tiny", "study.claim.cases.plain.part=x", "study.claim.cases.plain.part=x: use one of only"),
        ("tiny", "study.claim.number=one", "study.claim.number=one: use a valid integer"),
    ],
)
def test_nonsense_is_one_line(tmp_path: Path, name: str, setting: str, line: str) -> None:
    run = of(tmp_path, name, setting)
    assert run.code == 1
    assert run.err.startswith(f"error: {line}")
    assert not (tmp_path / "s" / "tiny").exists()
