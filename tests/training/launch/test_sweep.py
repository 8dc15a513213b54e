"""A sweep: jobs of their own, one group, a table; and issued again, only what is missing."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from rich.console import Console

import syncbn.training.launch.sweep
from syncbn.training.launch.sweep import _free, _name_and_value, _numbers, _run, summarize
from tests.training.support import wandb_log
from tests.training.support.train_command import Run, train

QUICK = ("model=mlp", "trainer.max_epochs=1")


def sweep(where: Path, *overrides: str, **options: Any) -> Run:
    return train(where, "-m", *QUICK, "hydra.sweep.dir=multirun/a", *overrides, timeout=170, **options)


def status(where: Path) -> dict[str, str]:
    return {path.parent.name: load(path)["status"] for path in (where / "multirun/a").glob("*/run.json")}


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def table(sweep_dir: Path) -> list[dict[str, str]]:
    with (sweep_dir / "sweep.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def job(directory: Path, overrides: str | list[str]) -> None:
    """Makes the directory of a job with this file of overrides, or with these overrides in it."""
    (directory / ".hydra").mkdir(parents=True)
    text = overrides if isinstance(overrides, str) else yaml.safe_dump(overrides)
    (directory / ".hydra/overrides.yaml").write_text(text, encoding="utf-8")


def test_each_job_has_its_own_processes_directory_and_wandb_run(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    probe = f"+callbacks.pid={{_target_: faults.WritePid, path: {pids}}}"
    run = sweep(tmp_path, "norm=local,sync", "seed=0,1", probe).ended()
    assert run.left == []
    assert status(tmp_path) == dict.fromkeys("0123", "finished")
    lines = pids.read_text(encoding="utf-8").split()
    assert len(lines) == len(set(lines)) == 4 * 2  # no rank is another job's, and none replays the sweep
    assert not (tmp_path / "outputs").exists()
    assert len(list(tmp_path.glob("multirun/*"))) == 1

    wandb = [{p.resolve() for p in tmp_path.glob(f"multirun/a/{job}/wandb/offline-run-*")} for job in range(4)]
    assert [len(each) for each in wandb] == [1, 1, 1, 1]
    assert {wandb_log.run(next(iter(each)))["run_group"] for each in wandb} == {"a"}
    read = [wandb_log.summary(each.pop()) for each in wandb]
    assert [(each["config"]["norm"]["name"], each["config"]["seed"]) for each in read] == [
        *(("local", 0), ("local", 1), ("sync", 0), ("sync", 1))
    ]

    rows = table(tmp_path / "multirun/a")
    results = [load(tmp_path / f"multirun/a/{job}/result.json")["test"]["test/acc"] for job in range(4)]
    assert [(row["job"], row["norm"], row["seed"], row["status"]) for row in rows] == [
        *(("0", "local", "0", "finished"), ("1", "local", "1", "finished")),
        *(("2", "sync", "0", "finished"), ("3", "sync", "1", "finished")),
    ]
    assert [float(row["test/acc"]) for row in rows] == results
    shown = run.out[run.out.rindex("  job ") :]
    assert all(f"{100 * result:.2f} %" in shown for result in results)

    # The same again does nothing, and a wider one only what is new; numbers stay with their jobs.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("multirun/a/*/result.json")}
    wider = sweep(tmp_path, "norm=local,sync", "seed=1,2", probe).ended()
    assert wider.out.count("has finished before") == 2
    assert status(tmp_path) == dict.fromkeys("012345", "finished")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for number, norm in ((4, "norm=local"), (5, "norm=sync")):
        new = load(tmp_path / f"multirun/a/{number}/run.json")["overrides"]
        assert {"norm=local", "norm=sync", "seed=2"} & set(new) == {norm, "seed=2"}


def test_a_failed_job_is_marked_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    die = f"+callbacks.fault={{_target_: faults.Fault, what: kill, once: {tmp_path / 'once'}, batch: 5, rank: 1}}"
    run = sweep(tmp_path, "data.global_batch_size=64,63,32", die, "logger=csv").ended(1)
    assert run.left == []
    assert "error: data.global_batch_size=63: 2 devices cannot share it equally; " in run.err
    assert "was killed by SIGKILL, perhaps for lack of memory (see dmesg); there was no checkpoint yet" in run.err
    assert run.err.splitlines()[-1] == (
        "error: 2 of 3 jobs failed (job 0, 1); the same sweep with hydra.sweep.dir=multirun/a runs the missing jobs"
    )
    assert "Traceback" not in run.err
    assert status(tmp_path) == {"0": "failed", "2": "finished"}
    again = sweep(tmp_path, "data.global_batch_size=64,32", die, "logger=csv").ended()
    assert "this run failed before; it had no checkpoint and starts over" in again.out
    assert again.out.count("has finished before") == 1
    assert status(tmp_path) == {"0": "finished", "2": "finished"}


def test_an_interrupted_sweep_goes_on_in_the_middle_of_its_job(tmp_path: Path) -> None:
    stop = f"+callbacks.fault={{_target_: faults.Fault, what: interrupt, once: {tmp_path / 'once'}, batch: 5}}"
    run = sweep(tmp_path, "seed=0,1", stop, "logger=csv").ended(130)
    assert run.left == []
    assert "the same sweep with hydra.sweep.dir=multirun/a resumes it" in run.err
    assert "  0     interrupted" in run.out  # the table
    assert status(tmp_path) == {"0": "interrupted"}
    again = sweep(tmp_path, "seed=0,1", stop, "logger=csv").ended()
    assert "this run was interrupted before; it resumes from " in again.out
    assert status(tmp_path) == {"0": "finished", "1": "finished"}


def test_a_second_sweep_in_the_directory_of_one_that_runs_is_refused(tmp_path: Path) -> None:
    said = tmp_path / "said"
    nested = f"+callbacks.nested={{_target_: faults.Nested, path: {said}}}"
    sweep(tmp_path, "seed=0", nested, "logger=csv").ended()
    assert re.fullmatch(
        r"1 error: hydra\.sweep\.dir=multirun/a: process \d+ on \S+ is running this sweep already; "
        r"wait for it, or use another directory\n",
        said.read_text(encoding="utf-8"),
    ), said.read_text(encoding="utf-8")
    assert status(tmp_path) == {"0": "finished"}


def test_a_sweeper_that_searches_gets_the_best_value_of_the_monitored_metric(tmp_path: Path) -> None:
    batches = '[["optimizer.lr=0.01", "optimizer.lr=-1", "optimizer.lr=-1"], ["optimizer.lr=0.01"]]'
    sweeper = ("hydra/sweeper=searching", f"hydra.sweeper.batches={batches}", f"hydra.sweeper.path={tmp_path}/answers")
    monitor = ("callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min")
    sweep(tmp_path, *sweeper, "trainer.max_epochs=2", "logger=csv", *monitor).ended()
    best, *failed, again = load(tmp_path / "answers")
    with (tmp_path / "multirun/a/0/metrics.csv").open(encoding="utf-8") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(losses) == 2
    assert best == again == min(losses)  # a job that has finished before returns what it had
    line = "error: job 1 failed: optimizer.lr=-1: use a number, 0 or more; the same sweep with "
    for kind, message in failed:
        assert kind == "CompactHydraException"  # of which Hydra prints one line
        assert message.startswith(line)


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("x=1", "x", "1"),
        ("+x=1", "x", "1"),
        ("++x=1", "x", "1"),
        ("+note='a b'", "note", "a b"),
        ('note="1, 2"', "note", "1, 2"),
        (r"note='it\'s'", "note", "it's"),
        ("note='é'", "note", "é"),
        ("note=''", "note", ""),
        ("note=", "note", ""),
        ("note='null'", "note", "null"),
        ("only=null", "only", "null"),
        ("norm.only=['*layer1*','a b']", "norm.only", "[*layer1*, a b]"),
        ("+c={a:1,b:[true,null]}", "c", "{a: 1, b: [true, null]}"),
        ("nesterov=True", "nesterov", "true"),
        ("lr=1.0e-3", "lr", "0.001"),
        ("~callbacks.checkpoint", "callbacks.checkpoint", "removed"),
        ("~seed=1", "seed", "removed"),
        ("norm@other=sync", "norm@other", "sync"),
        ("x=${seed}", "x", "${seed}"),
        ("+x=(", "x", "("),
    ],
)
def test_the_table_has_plain_names_and_values(override: str, name: str, value: str) -> None:
    assert _name_and_value(override) == (name, value)


def test_the_table_of_jobs_whose_settings_are_written_in_several_ways(tmp_path: Path) -> None:
    jobs = {"0": ["+x='a,\"b\"'", "seed=1"], "1": ["++x=é", "seed=2"], "2": ["x=[1,2]"], "3": ["+x='\udcc3\udca9'"]}
    for number, settings in jobs.items():
        job(tmp_path / number, settings)
    assert summarize(tmp_path, Console(quiet=True))
    rows = table(tmp_path)
    assert [row["x"] for row in rows] == ['a,"b"', "é", "[1, 2]", "é"]
    assert [row["seed"] for row in rows] == ["1", "2", "", ""]
    assert rows[0].keys() == {"job", "x", "seed", "status"}


@pytest.mark.parametrize("left", ["", "- model=ml\n- 'trainer", "model: mlp", "\0\0"])
def test_a_job_that_was_killed_in_its_first_moment_keeps_its_number(tmp_path: Path, left: str) -> None:
    job(tmp_path / "3", left)
    job(tmp_path / "1", "- seed=1")
    (tmp_path / "007").mkdir()
    numbers = _numbers(tmp_path)
    assert numbers == {("seed=1",): 1}
    assert _free(numbers, tmp_path) == 4
    assert _free(numbers | {("seed=2",): 6}, tmp_path) == 7  # one that has made no directory
    assert summarize(tmp_path, Console(quiet=True))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_the_ranks_of_a_job_one_writes_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str
) -> None:
    """Two that write at once take each other's draft away, and then the job fails."""
    config = OmegaConf.create({"hydra": {"job": {}, "overrides": {"task": ["seed=1"]}}})
    loader = SimpleNamespace(load_sweep_config=lambda master, overrides: config)
    launcher = SimpleNamespace(hydra_context=SimpleNamespace(config_loader=loader), config=config, task_function=None)
    monkeypatch.setattr(syncbn.training.launch.sweep, "run_job", lambda **_: JobReturn(status=JobStatus.COMPLETED))
    monkeypatch.setenv("RANK", rank)
    assert _run(launcher, ["seed=1"], 0, tmp_path).status == JobStatus.COMPLETED
    assert _numbers(tmp_path) == ({("seed=1",): 0} if rank == "0" else {})


def test_the_table_of_damaged_jobs(tmp_path: Path) -> None:
    jobs = {0: ["+job=abc", "+status=mine"], 1: ["+x=" + "[" * 2000 + "]" * 2000], 2: ["seed=1"]}
    for number, settings in jobs.items():
        job(tmp_path / f"{number}", settings)
        (tmp_path / f"{number}/result.json").write_text('{"test": {"job": 7.5}}', encoding="utf-8")
    assert summarize(tmp_path, Console(quiet=True))
    assert [row["job"] for row in table(tmp_path)] == ["0", "1", "2"]


def test_a_table_that_cannot_be_written_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job(tmp_path / "0", "- seed=1\n")
    (tmp_path / "sweep.csv").mkdir()
    assert summarize(tmp_path, Console())
    shown = capsys.readouterr()
    assert "failed" in shown.out
    assert shown.err == f"error: {tmp_path}/sweep.csv: Is a directory; a directory has this name: move it away\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "sweep.csv"]


def test_directories_by_another_name_than_the_jobs_number_are_refused(tmp_path: Path) -> None:
    run = sweep(tmp_path, "seed=0,1", "logger=csv", "hydra.sweep.subdir=${hydra.job.override_dirname}").ended(1)
    assert run.err == (
        "error: hydra.sweep.subdir=${hydra.job.override_dirname}: leave it out; "
        "a job's directory is named by its number\n"
    )
