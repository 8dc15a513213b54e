"""Symbolic links in a run directory: they are read, and what is written never changes a file that they lead to."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from typer.testing import CliRunner

from syncbn.cli import app
from syncbn.training.checkpoint import files
from syncbn.training.checkpoint.atomic_io import AtomicCheckpointIO
from syncbn.training.checkpoint.resume_points import ResumePoints
from syncbn.training.config import compare
from syncbn.training.errors import SettingError
from syncbn.training.loggers import csv_logger, wandb_files, wandb_internals, wandb_logger
from syncbn.training.run_directory import lock, record, symlinks
from syncbn.training.run_directory import paths as identity
from tests.study.support import run_directories
from tests.training.support.settled_config import settled
from tests.training.support.train_command import Run, contents, train

QUICK = ("model=mlp", "trainer.devices=1", "data.global_batch_size=64", "logger=csv", "test=false")
TARGETS = ("nowhere", "loop", "file")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory that no run may change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("precious", encoding="utf-8")
    return tmp_path / "outside"


def link(path: Path, target: str, outside: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path if target == "loop" else outside / target)


@pytest.mark.parametrize("target", TARGETS)
def test_no_writer_follows_a_link(tmp_path: Path, outside: Path, target: str) -> None:
    before, run_dir = contents(outside), tmp_path / "run"
    run_dir.mkdir()
    names = [".run.json", ".config.yaml", ".lock", "run.json", "config.yaml"]
    names += [".best.ckpt.part", "best.ckpt", "last.ckpt", ".last.ckpt.part"]
    for name in [*names, *symlinks.APPENDED, *symlinks.FOLDERS]:
        link(run_dir / name, target, outside)
    if target == "file":
        (run_dir / "run.json").unlink()  # it is no record
    lock.hold(run_dir)
    assert sorted(symlinks.detach(run_dir)) == sorted([*symlinks.APPENDED, *symlinks.FOLDERS])
    record.begin(settled(run_dir=run_dir), "run", [])
    record.end(run_dir, "failed")
    lock.release(run_dir)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, run_dir / "best.ckpt")
    files.link(run_dir / "best.ckpt", "last.ckpt")
    for name in symlinks.APPENDED:
        with (run_dir / name).open("a", encoding="utf-8") as file:
            file.write("more\n")
    assert contents(outside) == before
    assert record.read(run_dir, "run")["status"] == "failed"
    links = {path.name for path in run_dir.iterdir() if path.is_symlink()}
    assert links <= {"config-0.yaml", "damaged-run.json"}  # put aside, and only read
    if target == "file":
        assert (run_dir / "wandb-lines.jsonl").read_text(encoding="utf-8") == "preciousmore\n"


def test_a_linked_directory_becomes_one_of_links(tmp_path: Path, outside: Path) -> None:
    (outside / "step-00000001.ckpt").write_bytes(b"1")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(os.path.relpath(outside, run_dir))
    before = contents(outside)
    assert symlinks.detach(run_dir) == ["checkpoints"]
    assert symlinks.detach(run_dir) == []
    assert contents(run_dir / "checkpoints") == before
    (run_dir / "checkpoints/step-00000001.ckpt").unlink()
    (run_dir / "checkpoints/new").touch()
    assert contents(outside) == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of one epoch, to be copied."""
    where = tmp_path_factory.mktemp("stopped")
    train(where, *QUICK, "trainer.max_epochs=1", "run.id=a").ended()
    return where


def more(where: Path, *settings: str) -> Run:
    return train(where, *QUICK, "trainer.max_epochs=2", *settings)


@pytest.mark.parametrize("how", ["run", "checkpoints", "files", "last", "names"])
def test_a_run_is_resumed_through_links_and_leaves_alone_what_they_lead_to(
    tmp_path: Path, outside: Path, stopped: Path, how: str
) -> None:
    shutil.copytree(stopped / "outputs", tmp_path / "outputs")
    run_dir = tmp_path / "outputs/a"
    if how in ("run", "names"):
        shutil.move(run_dir, outside / "b")
        run_dir.symlink_to(outside / "b")
    elif how == "checkpoints":
        shutil.move(run_dir / "checkpoints", outside / "kept")
        (run_dir / "checkpoints").symlink_to(outside / "kept")
    else:
        for path in (run_dir / "checkpoints").glob("step-*" if how == "last" else "nothing"):
            path.unlink()
        for path in [*(run_dir / "checkpoints").iterdir(), *(p for p in run_dir.iterdir() if p.is_file())]:
            shutil.move(path, outside / path.name)
            path.symlink_to(outside / path.name)
    before = contents(outside)
    again = more(tmp_path, "hydra.run.dir=outside/b" if how == "names" else "run.id=a").ended()
    assert "resumes from" in again.out
    about, result = record.read(run_dir, "run"), record.read(run_dir, "result")
    assert (about["status"], about["attempt"], result["epochs"]) == ("finished", 2, 2)
    assert {row["epoch"] for row in csv_logger.read(run_dir / "metrics.csv")} >= {"0", "1"}
    assert Path(result["checkpoint"]).resolve() == (run_dir / "checkpoints/best.ckpt").resolve()
    if how not in ("run", "names"):
        assert contents(outside) == before
    else:
        assert not run_dir.parent.joinpath("b").exists()


def lock_is_free(path: str) -> bool:
    try:
        lock.hold(Path(path))
    except SettingError:
        return False
    return True


def test_a_run_with_two_names_has_one_lock(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with multiprocessing.get_context("fork").Pool(1) as pool:  # before: a fork would hold what this process holds
        lock.hold(tmp_path / "a")
        assert not pool.apply(lock_is_free, (str(tmp_path / "b"),))
        lock.release(tmp_path / "a")
        assert pool.apply(lock_is_free, (str(tmp_path / "b"),))


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("target", ["nowhere", "loop"])
def test_a_checkpoint_that_leads_nowhere_is_named(tmp_path: Path, outside: Path, mode: str, target: str) -> None:
    record.begin(settled("model=mlp", run_dir=tmp_path / "outputs/a"), "a", [])
    (tmp_path / "outputs/a/checkpoints").mkdir()
    link(tmp_path / "outputs/a/checkpoints/best.ckpt", target, outside)
    ended = train(
        tmp_path, "ckpt_path=outputs/a/checkpoints/best.ckpt", f"mode={mode}", "run.id=b", "logger=csv"
    ).ended(1)
    line = "ckpt_path=outputs/a/checkpoints/best.ckpt: this is a symbolic link to a file that is not there; "
    assert ended.err.startswith(f"error: {line}")
    assert ended.err.count("\n") == 1


def test_broken_links_among_resume_points_are_passed_over(tmp_path: Path, outside: Path) -> None:
    for target, step in (("nowhere", 3), ("loop", 2)):
        link(tmp_path / f"step-0000000{step}.ckpt", target, outside)
    torch.save({}, tmp_path / "step-00000001.ckpt")
    said: list[str] = []
    assert files.newest(tmp_path, said.append) == tmp_path / "step-00000001.ckpt"
    assert [line.partition(" is damaged (")[0] for line in said] == ["step-00000003.ckpt", "step-00000002.ckpt"]


def test_the_run_of_a_checkpoint_is_the_one_that_is_named_else_that_of_the_file(tmp_path: Path, outside: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "a/checkpoints/best.ckpt").touch()
    link(tmp_path / "champion.ckpt", "../a/checkpoints/best.ckpt", outside)
    link(tmp_path / "b/checkpoints/best.ckpt", "../a/checkpoints/best.ckpt", outside)
    link(tmp_path / "b/checkpoints/store.ckpt", "file", outside)  # a store of files by their contents
    link(tmp_path / "b/checkpoints/loop.ckpt", "loop", outside)
    for name, run in {
        "champion": "a",
        "b/checkpoints/best": "b",
        "b/checkpoints/store": "b",
        "b/checkpoints/loop": "b",
    }.items():
        assert identity.run_of(tmp_path / f"{name}.ckpt") == (tmp_path / run).resolve()
    assert identity.run_of(tmp_path / "a/checkpoints/../../b/checkpoints/best.ckpt") == (tmp_path / "b").resolve()
    assert identity.run_of(tmp_path / "a/checkpoints/../../outside/file") is None
    assert identity.run_of(outside / "file") is None


class Trainer:
    """As much of Lightning's as the hook reads."""

    should_stop = False

    def __init__(self, ckpt_path: Path, callback: ModelCheckpoint) -> None:
        self.ckpt_path, self.checkpoint_callbacks = str(ckpt_path), [callback]


def loaded(home: Path, ckpt_path: Path, state: dict[str, Any]) -> ModelCheckpoint:
    """ModelCheckpoint of the run at ``home`` after it has loaded this state from the checkpoint at ``ckpt_path``."""
    home.mkdir(parents=True, exist_ok=True)
    callback = ModelCheckpoint(dirpath=home, monitor="val/acc")
    checkpoint = {"resume": {}, "callbacks": {callback.state_key: state}}
    ResumePoints(home).on_load_checkpoint(Trainer(ckpt_path, callback), None, checkpoint)  # type: ignore[arg-type]
    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    return callback


def state(home: Path, best: str) -> dict[str, Any]:
    paths = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), best)
    return {"dirpath": str(home), "best_model_score": 1.0, "kth_value": 1.0, "best_k_models": {best: 1.0}, **paths}


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
def test_a_checkpoint_does_not_decide_which_files_are_deleted_or_tested(tmp_path: Path, outside: Path) -> None:
    home = (tmp_path / "a/checkpoints").resolve()
    home.mkdir(parents=True)
    (home / "best.ckpt").touch()
    ours = str(home / "best.ckpt")
    kept = loaded(home, home / "last.ckpt", state(home, ours))
    assert (kept.best_model_path, kept.kth_best_model_path, kept.best_k_models) == (ours, ours, {ours: 1.0})
    for path in (
        str(outside / "file"),
        f"{home}/../../outside/file",
        f"local://{outside}/file",
        "https://example.com/best.ckpt",
        str(home / "gone.ckpt"),
        str(home),
        "",
    ):
        other = loaded(home, home / "last.ckpt", state(home, path))
        assert (other.best_model_path, other.kth_best_model_path, other.last_model_path) == ("", "", ""), path
        assert other.best_k_models == {}


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
def test_a_run_that_was_moved_knows_its_best_and_a_new_one_has_none(tmp_path: Path) -> None:
    home = (tmp_path / "moved/checkpoints").resolve()
    home.mkdir(parents=True)
    (home / "best.ckpt").touch()
    before = tmp_path / "a/checkpoints"
    moved = loaded(home, home / "last.ckpt", state(before, str(before / "best.ckpt")))
    assert moved.best_model_path == str(home / "best.ckpt")
    assert moved.best_k_models == {str(home / "best.ckpt"): 1.0}
    new = loaded(tmp_path / "b/checkpoints", home / "last.ckpt", state(home, str(home / "best.ckpt")))
    assert (new.best_model_path, new.best_k_models) == ("", {})


def test_the_report_of_a_comparison_writes_where_it_is(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_directories.sweep(tmp_path / "runs", {"local": {0: 2.0, 1: 2.1}, "sync": {0: 1.0, 1: 1.2}})
    compare = ["compare", "runs"]
    assert CliRunner().invoke(app, compare).exit_code == 0
    before = contents(outside)
    report = tmp_path / "runs/compare"
    for path in [path for path in report.rglob("*") if path.is_file()]:
        link(path, "file", outside)
    assert CliRunner().invoke(app, compare).exit_code == 0
    assert contents(outside) == before
    for name in ("plots", "tables"):
        shutil.rmtree(report / name)
        (report / name).symlink_to(outside)
    assert CliRunner().invoke(app, compare).exit_code == 0
    assert contents(outside) == before
    shutil.rmtree(report)
    report.symlink_to(outside)
    refused = CliRunner().invoke(app, compare)
    assert refused.exit_code == 1
    assert refused.output.startswith(f"error: --report={report}: this is a symbolic link; use --report with ")


def test_wandbs_reader_imports_nothing_from_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = tmp_path / "wandb/offline-run-20260101_000000-a"
    attempt.mkdir(parents=True)
    (attempt / "run-a.wandb").write_bytes(b"")
    for module in ("wandb/__init__.py", "wandb/__main__.py", "json.py"):
        (tmp_path / module).write_text(f"open({str(tmp_path / 'imported')!r}, 'w')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert wandb_internals.history(attempt) == []
    assert not (tmp_path / "imported").exists()


def test_wandb_runs_no_git_in_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its .git/config may name programs, of which ``git diff`` starts some."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(wandb_logger.wandb, "setup", lambda settings: None)
    monkeypatch.setattr(wandb_logger.wandb, "init", lambda **options: seen.update(options))
    plan = settled(run_dir=tmp_path / "run")
    record.begin(plan, "run", [])
    wandb_logger._init(plan.cfg, tmp_path / "run", "offline")
    assert seen["settings"].git_root == str(Path.cwd())


@pytest.mark.parametrize("wandb_id", ["../../x", 5, None, ["a"]])
def test_a_wandb_id_that_is_a_path_names_no_files(tmp_path: Path, wandb_id: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"wandb_id": wandb_id}), encoding="utf-8")
    assert wandb_files.directories(tmp_path) == []


def test_settings_of_earlier_attempts_show_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    cfg = settled().cfg
    before = OmegaConf.create(OmegaConf.to_yaml(cfg))
    before.model.width = "${oc.env:SECRET}"
    assert compare.changes_of(cfg, before, []) == ["model.width=${oc.env:SECRET} -> 16"]
