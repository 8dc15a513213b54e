"""Several runs at once: one that cannot begin, or is killed, is told of, and the others go on."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.training.launch import job, run_pool
from syncbn.training.launch.outcome import Outcome
from syncbn.training.launch.run_pool import Run
from syncbn.training.loggers import run_loggers
from syncbn.training.processes.rank_processes import End, Ranks, Requests
from syncbn.training.run_directory import lock, record
from tests.training.run_directory.test_record import finished, settings
from tests.training.support.train_command import contents

KILLED = End(0, 1, -9)


class Ended:
    """Ranks that have ended already, as the name of their run says."""

    def __init__(self, count: int, entry: Any, args: tuple[Path], logs: Path, *, silent: bool, signals: Any) -> None:
        self.name = args[0].name
        if self.name == "unstarted":
            raise RuntimeError("the server\nsocket")
        if self.name == "killed":
            record.write(args[0], "wandb", {"finished": False})
        self.closed = False

    def poll(self, *_: Any) -> bool:
        return False

    def sentinels(self) -> list[int]:
        return []

    def close(self) -> None:
        self.closed = True

    def ends(self) -> list[End]:
        assert self.closed
        return [KILLED] if self.name == "killed" else []


class Here:
    """A rank that does its work at once, in this process."""

    def __init__(self, count: int, entry: Any, args: tuple[Path], logs: Path, *, silent: bool) -> None:
        entry(*args)

    def watch(self, *_: Any, limit: float) -> None:
        pass


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Run directories whose W&B run was closed as failed."""
    directories: list[Path] = []
    monkeypatch.setattr(run_pool, "Ranks", Ended)
    monkeypatch.setattr(job, "Ranks", Here)
    monkeypatch.setattr(run_loggers, "mark_failed", lambda cfg, run_dir, status: directories.append(run_dir))
    return directories


def test_one_that_cannot_begin_does_not_stop_the_others(tmp_path: Path, closed: list[Path]) -> None:
    (tmp_path / "file").touch()
    finished(tmp_path / "other")
    names = ("file/below", "other", "unstarted", "killed", "good")
    sizes = {"other": 8}
    runs = [Run(settings(max_epochs=2, batch_size=sizes.get(name, 4), run_dir=tmp_path / name), []) for name in names]
    told: list[tuple[Path, Outcome]] = []
    outcomes = run_pool.run_all(runs, 1, Requests(), lambda run, end: told.append((run.directory, end)))
    assert told == list(outcomes.items())
    below, other, unstarted, killed, good = outcomes.values()
    assert [each.status for each in outcomes.values()] == ["failed"] * 4 + ["finished"]
    assert below.message.startswith("NotADirectoryError: ")
    assert "run has finished with other settings (data.global_batch_size=8 -> 16)" in other.message
    assert unstarted.message == "RuntimeError: the server socket"
    assert "was killed by SIGKILL, perhaps for lack of memory (see dmesg); the same command resumes" in killed.message
    assert good.message == ""
    status = {name: record.read(tmp_path / name, "run")["status"] for name in names[1:]}
    assert status == {"other": "finished", "unstarted": "failed", "killed": "failed", "good": "finished"}
    assert closed == [tmp_path / "killed"]
    assert not lock._held.keys() & {run.directory for run in runs}


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path: Path, closed: list[Path]) -> None:
    run = Run(settings(run_dir=tmp_path / "a"), [])
    record.begin(run.plan, "a", [])
    lock.hold(run.directory)
    outcomes = run_pool.run_all([run], 1, Requests(), lambda run, end: None)
    assert "is running this run already" in outcomes[run.directory].message
    assert record.read(run.directory, "run")["status"] == "running"
    assert run.directory in lock._held
    lock.release(run.directory)


def test_ranks_that_started_are_ended_where_another_could_not(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(TypeError, match="no more"):
        Ranks(2, time.sleep, (Once(tmp_path / "begun"),), tmp_path / "logs")
    assert (tmp_path / "begun").exists()
    assert set(multiprocessing.active_children()) <= before


class Once:
    """Pickles once, as 20 seconds."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        if self.mark.exists():
            raise TypeError("no more")
        self.mark.touch()
        return float, (20,)


def test_runs_that_begin_from_a_checkpoint_are_done_once(tmp_path: Path, closed: list[Path]) -> None:
    """And the run that the checkpoint is of is left alone."""
    base = finished(tmp_path / "base")
    torch.save({"state_dict": {}}, base / "checkpoints/best.ckpt")
    before = contents(base)
    attempts = []
    for _ in range(2):
        run = Run(settings(base / "checkpoints/best.ckpt", run_dir=tmp_path / "good"), [])
        outcomes = run_pool.run_all([run], 1, Requests(), lambda run, end: None)
        assert [each.status for each in outcomes.values()] == ["finished"]
        attempts.append(record.read(run.directory, "run")["attempt"])
    assert attempts == [1, 1]
    assert contents(base) == before
