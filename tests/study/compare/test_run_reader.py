"""Tests reading of complete and damaged run directories."""

from pathlib import Path

import pytest

from syncbn.study.compare.runs.run_reader import directories, read, root, short
from tests.study.support import run_directories
from tests.support.refuses import refuses

DEEP = "model: " + "{a: " * 60 + "1" + "}" * 60 + "\n"
ITSELF = "model: &a\n  again: *a\n"
BOMB = "x0: &x0 [0]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 12))


@pytest.mark.usefixtures("here")
def test_runs_sweeps_and_what_holds_them(tmp_path: Path) -> None:
    sweep = run_directories.sweep(tmp_path / "multirun/a", {"local": run_directories.by_seed(range(12))})
    alone = run_directories.run(tmp_path / "outputs/mine")
    (alone / "wandb/run").mkdir(parents=True)
    run_directories.run(alone / "within")  # no run directory lies in another
    (tmp_path / "multirun/a/compare").mkdir()
    found = [run.path for run in read([tmp_path, Path("multirun/a/3"), alone])]
    assert found == [*(sweep / str(number) for number in range(12)), alone]
    assert root(found) == tmp_path
    assert root(directories([sweep])) == sweep


def test_a_whole_run(tmp_path: Path) -> None:
    layers = [run_directories.layer("x")]
    (run,) = read([run_directories.run(tmp_path / "a", seed=3, error=2.5, precise_error=2.25, layers=layers)])
    assert (run.status, run.trouble, run.seed) == ("finished", "", 3)
    assert run.number("test/acc") == 0.975
    assert run.number("precise/acc") == 0.9775
    assert run.number("images_per_second") == 400
    assert list(run.metrics()["val/acc"].dropna()) == [0.7, 0.9, 0.95]
    assert list(run.statistics()["layer"]) == ["x"]


@pytest.mark.parametrize(
    ("status", "trouble"),
    [
        ("failed", "it failed: RuntimeError: no"),
        ("interrupted", "it was interrupted: RuntimeError: no"),
        ("running", "it had not ended when this was computed: it is running, or was killed"),
    ],
)
def test_a_run_that_came_to_no_end(tmp_path: Path, status: str, trouble: str) -> None:
    path = run_directories.run(tmp_path / "a", status=status, error=None)
    (path / "error.txt").write_text("Traceback ...\n\nRuntimeError: no\n", encoding="utf-8")
    (run,) = read([path])
    assert (run.status, run.trouble) == (status, trouble)
    assert run.config["norm"] == {"name": "local"}


@pytest.mark.parametrize("settings", [ITSELF, BOMB, DEEP, f"seed: {10**30}\n"])
def test_settings_that_nobody_can_compute_with_are_damage(tmp_path: Path, settings: str) -> None:
    path = run_directories.run(tmp_path / "a")
    text = (path / "config.yaml").read_text(encoding="utf-8")
    (path / "config.yaml").write_text(text + settings, encoding="utf-8")
    (run,) = read([path])
    assert run.trouble == "config.yaml cannot be read: it is damaged"


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "result.json"])
@pytest.mark.parametrize("how", ["half", "gone", "empty", "list"])
def test_a_damaged_run_is_kept(tmp_path: Path, name: str, how: str) -> None:
    path = run_directories.run(tmp_path / "a")
    if how == "half":
        run_directories.damage(path / name)
        if name == "config.yaml":
            (path / name).write_text("data: [1,\n", encoding="utf-8")  # half of a YAML file is one too
    elif how == "gone":
        (path / name).unlink()
    else:
        (path / name).write_text("" if how == "empty" else "[1]", encoding="utf-8")
    (run,) = read([path])
    gone = how == "gone"
    assert run.status == ("failed" if gone and name == "run.json" else "no result")
    if name != "run.json" or not gone:
        assert run.trouble == f"{name} {'is missing' if gone else 'cannot be read: it is damaged'}"


def test_a_job_that_failed_before_it_had_a_record(tmp_path: Path) -> None:
    sweep = run_directories.sweep(tmp_path / "a", {"local": {0: 2.0}})
    (sweep / "1/.hydra").mkdir(parents=True)
    (sweep / "1/.hydra/overrides.yaml").write_text("- norm=sync\n- data.global_batch_size=63\n", encoding="utf-8")
    _, refused = read([sweep])
    assert refused.status == "failed"
    assert "norm=sync data.global_batch_size=63" in refused.trouble


def test_metrics_that_are_no_numbers(tmp_path: Path) -> None:
    path = run_directories.run(tmp_path / "a", test={"test/acc": float("nan"), "test/note": "x", "test/flag": True})
    assert "NaN" in (path / "result.json").read_text(encoding="utf-8")
    (run,) = read([path])
    assert run.number("test/acc") != run.number("test/acc")
    assert {"test/note", "test/flag"}.isdisjoint(run.numbers())
    lines = (path / "metrics.csv").read_text(encoding="utf-8")
    (path / "metrics.csv").write_text(lines + "3,399,,0.9", encoding="utf-8")  # the last line is half of 0.95
    assert len(run.metrics()) == 6
    (path / "metrics.csv").write_text("\0\0", encoding="utf-8")
    assert run.metrics().empty
    (path / "statistics.csv").write_text("step,layer\n1,x\n", encoding="utf-8")
    assert run.statistics().empty


def test_paths_without_a_run_are_refused(tmp_path: Path) -> None:
    run = run_directories.run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with refuses("RUNS", tmp_path / "gone", "there is no such directory; give run directories"):
        read([run, tmp_path / "gone"])
    with refuses("RUNS", tmp_path / "empty", "there is no run in it; "):
        read([tmp_path / "empty", run])
    with refuses("RUNS", run / "run.json", "this is a file; "):
        read([run / "run.json"])


def test_paths_are_shown_without_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_directories.run(tmp_path / "here/multirun/a/0")
    assert short(path, path.parent) == "a/0"
    monkeypatch.chdir(tmp_path / "here")
    assert short(path, path.parent) == "multirun/a/0"
