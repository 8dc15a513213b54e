"""Run directories that cannot be, that are damaged, or that belong to a run that was killed: one line, nothing lost."""

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from syncbn.study.compare.runs import run_reader
from syncbn.training import atomic_write
from syncbn.training.checkpoint import continue_run, files
from syncbn.training.console import printable
from syncbn.training.errors import SettingError
from syncbn.training.launch import check_directories, summary, sweep
from syncbn.training.loggers.csv_logger import MetricsFile, read
from syncbn.training.loggers.wandb_journal import Journal, Line
from syncbn.training.run_directory import lock, record, symlinks
from tests.training.support.own_mount import own_mount
from tests.training.support.settled_config import settled
from tests.training.support.train_command import REPO, contents, train

SAME = ("model=mlp", "logger=csv", "trainer.devices=1", "trainer.max_epochs=2")
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda contents: b"",
    "half": lambda contents: contents[: len(contents) // 2],
    "zeros": lambda contents: bytes(len(contents)),
    "garbage": lambda contents: bytes(range(256)) * 3,
    "a list": lambda contents: b"[1, 2]\n",
    "no keys": lambda contents: b"{}\n",
    "text": lambda contents: b'"hello"\n',
    "deep": lambda contents: b"[" * 100_000 + b"\n",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has finished."""
    where = tmp_path_factory.mktemp("base")
    train(where, "run.id=A", *SAME).ended()
    return where / "outputs/A"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_dir(base: Path, here: Path) -> Path:
    return Path(shutil.copytree(base, here / "outputs/A"))


def change_newest(run_dir: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the newest resume point, but not ``last.ckpt``, which is the same file."""
    path = run_dir / "checkpoints/step-00000072.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    path.unlink()
    torch.save(checkpoint, path)


def interrupted(run_dir: Path) -> Path:
    (run_dir / "result.json").unlink(missing_ok=True)
    record.write(run_dir, "run", record.read(run_dir, "run") | {"status": "interrupted"})
    return run_dir


def checked(capsys: pytest.CaptureFixture[str], run_id: str | None = None, **hydra: str) -> str:
    """The line that ends the program before the directory is made; empty where nothing does."""
    run, sweep_dir = hydra.get("run", f"outputs/{run_id}"), hydra.get("sweep")
    cfg = OmegaConf.create(
        {"run": {"id": run_id}, "study": None, "hydra": {"run": {"dir": run}, "sweep": {"dir": sweep_dir}}}
    )
    check, code = check_directories.CheckDirectories(), None
    try:
        check.on_multirun_start(cfg) if sweep_dir is not None else check.on_run_start(cfg)
    except SystemExit as end:
        code = end.code
    line = capsys.readouterr().err
    assert (code, line.count("\n")) == ((1, 1) if line else (None, 0))
    return line.removesuffix("\n")


# Names and places


BAD_IDS = (
    *("", ".", "..", "../../x", "/abs", "a/b", "a\nb", "a\tb", "a\x1b[31mb"),
    *(" a", "a ", "a.", "-a", "a:b", "n" * 256),
)


@pytest.mark.parametrize("name", BAD_IDS)
def test_a_name_that_cannot_be_is_refused_before_anything_is_made(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(capsys, name).startswith(f"error: run.id={printable(name)[:20]}")
    assert not list(here.iterdir())


def test_names_that_can_be_are_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mine", "a b", "Müller", "日本", "lr+0.1@x", "a.b", "n" * 255):
        assert checked(capsys, name) == ""
        assert (here / "outputs" / name).is_dir()


def test_a_sweep_under_torchrun_is_refused_once_and_before_anything_is_made(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("RANK", "0")
    assert checked(capsys, sweep="multirun/a").startswith("error: -m: torchrun starts the ranks of one run, not of a ")
    assert not list(here.iterdir())


@pytest.mark.parametrize(("given", "read_as"), [("1.50", 1.5), ("1e3", 1000.0), ("true", True), ("1_000", 1000)])
def test_an_id_that_would_be_another_is_refused(given: str, read_as: object) -> None:
    with pytest.raises(SettingError, match=rf"^run\.id={given}: Hydra reads this as {read_as}; put it into quotes"):
        check_directories._check_spelling(str(read_as), ["seed=1", f"run.id={given}"])


@pytest.mark.parametrize(
    ("given", "read_as"),
    [("'1.50'", "1.50"), ("007", "007"), ("a.b", "a.b"), ("null", None), ("${seed}", "1"), ("a\\ b", "a b")],
)
def test_an_id_that_is_as_it_was_given_is_taken(given: str, read_as: str | None) -> None:
    check_directories._check_spelling(read_as, [f"run.id={given}"])


def test_train_py_refuses_them_so(tmp_path: Path) -> None:
    where = tmp_path / "a/b"
    where.mkdir(parents=True)
    run = train(where, "run.id=../../x").ended(1)
    assert run.err.startswith("error: run.id=../../x: use letters, digits, ")
    for settings in (("data.batch_size=0",), ("ckpt_path=nowhere",), ("-m", "run.id=x", "seed=0,1")):
        refused = train(where, *settings).ended(1)
        assert refused.err.startswith("error: ")
        assert refused.err.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


@pytest.mark.parametrize(
    ("hydra", "line"),
    [
        ({"run": ""}, "hydra.run.dir=: a run needs its own directory"),
        ({"run": "."}, "hydra.run.dir=.: a run needs its own directory"),
        ({"run": "/"}, "hydra.run.dir=/: a run needs its own directory"),
        ({"run": "a\nb"}, "hydra.run.dir=a\\nb: it has control characters"),
        ({"run": "file/a"}, "hydra.run.dir=file/a: no directory can be made there (file/a: Not a directory; a part of"),
        (
            {"run": "file"},
            "hydra.run.dir=file: no directory can be made there (file: File exists; a file has this name",
        ),
        ({"run": "n" * 300}, "run directory: nnn"),
        ({"run": "outputs/A/x"}, "hydra.run.dir=outputs/A/x: this lies in the directory of another run, "),
        ({"run": "outputs"}, "hydra.run.dir=outputs: this holds other runs (A); use outputs/NAME"),
        ({"sweep": ""}, "hydra.sweep.dir=: a run needs its own directory"),
        ({"sweep": "outputs/A"}, "hydra.sweep.dir=outputs/A: this is the directory of a run"),
        ({"sweep": "file/a"}, "hydra.sweep.dir=file/a: no directory can be made there (file/a: Not a directory; "),
    ],
)
def test_a_directory_that_cannot_be_is_named(
    hydra: dict[str, str], line: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    before = sorted(Path().rglob("*"))
    assert checked(capsys, **hydra).startswith(f"error: {line}")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device, "),
        (errno.EROFS, "Read-only file system; mount it writable, or use another directory"),
        (errno.EACCES, "Permission denied; this user may not write there"),
        (errno.EPERM, "Operation not permitted; this user may not change it, or it is immutable (lsattr, chattr -i)"),
        (errno.EMFILE, "Too many open files, ulimit -n is "),
        (errno.EIO, "Input/output error; use another directory"),
    ],
)
def test_what_the_system_says_is_said(
    number: int, advice: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = checked(capsys, "a")
    assert line.startswith(f"error: hydra.run.dir=outputs/a: no directory can be made there (outputs/a: {advice}")
    assert ("make room" in line) == (number == errno.ENOSPC)


def test_too_few_open_files_are_one_line(tmp_path: Path) -> None:
    script = f'ulimit -n 20; exec {sys.executable} {REPO}/train.py model=mlp "$@"'
    run = train(tmp_path, "trainer.max_epochs=1", launcher=["sh", "-c", script]).ended(1)
    assert run.err == "error: ulimit -n 20: too few open files for a run; use at least 64 (ulimit -n 1024)\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", ["size=4k,nr_inodes=2", "size=4k,nr_inodes=3", "size=4k,nr_inodes=4"])
def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_nothing(tmp_path: Path, options: str) -> None:
    """A file system with room for the directory, for one file, and for two."""
    with own_mount(tmp_path / "mount", f"-o {options}") as mount:
        run = train(tmp_path, *SAME, "hydra.run.dir=mount/a", within=mount.process).ended(1)
        assert not list(mount.seen.iterdir())
    assert run.err.startswith("error: run.id=a: ")
    assert ": No space left on device, 0 MiB" in run.err
    assert run.err.endswith(" are free there; make room\n")
    assert run.err.count("\n") == 1


# Damaged files


ODD: dict[str, tuple[str, str]] = {
    "a list where numbers are by name": ("result", '"monitored": [1]'),
    "nothing where numbers are by name": ("result", '"monitored": {"val/acc": "x"}'),
    "text for a number": ("result", '"test": {"test/acc": "x"}'),
    "more than 64 bits": ("result", '"test": {"test/acc": ' + "9" * 400 + "}"),
    "a number for a path": ("result", '"checkpoint": 5'),
    "text for seconds": ("result", '"seconds": "x"'),
    "a number for a checkpoint tested": ("run", '"tests": 5'),
    "an object for a version": ("run", '"versions": {"torch": {"a": [1]}}'),
    "deep": ("run", '"more": ' + '{"a": ' * 60 + "1" + "}" * 60),
}


@pytest.mark.parametrize("what", ODD)
def test_values_of_another_kind_are_damage_for_every_reader(run_dir: Path, what: str) -> None:
    name, put = ODD[what]
    path = run_dir / f"{name}.json"
    path.write_text(f"{path.read_text(encoding='utf-8').rstrip().removesuffix('}')}, {put}}}\n", encoding="utf-8")
    assert f"{name}.json is damaged" in record.damage(run_dir, name)
    if name == "run":
        assert record.recovered(run_dir)["status"] == "finished"
    else:
        assert record.monitored(run_dir) is None
    text = Console(width=200)
    with text.capture() as shown:
        text.print(summary.summary(run_dir))
    assert ("result.json is damaged" in shown.get()) is (name == "result")
    (found,) = run_reader.read([run_dir])
    assert (found.status, found.trouble) == ("no result", f"{name}.json cannot be read: it is damaged")
    place = run_dir.parent / "sweep"
    place.mkdir()
    run_dir.rename(place / "0")
    (place / "0/.hydra").mkdir(exist_ok=True)
    (place / "0/.hydra/overrides.yaml").write_text("- seed=1\n", encoding="utf-8")
    assert sweep.summarize(place, Console(quiet=True))


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "result.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    os.mkfifo(run_dir / name)
    again = train(run_dir.parents[1], "run.id=A", *SAME, timeout=60)
    assert (again.code, again.err) == (0, "")
    assert (run_dir / name).is_file()


@pytest.mark.parametrize("name", ["metrics.csv", "train.log"])
def test_a_pipe_that_would_be_written_to_is_refused(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink(missing_ok=True)
    os.mkfifo(run_dir / name)
    with pytest.raises(SettingError, match=rf"{name}: this is no regular file, and the run writes to it; remove it"):
        symlinks.detach(run_dir)


def test_pipes_in_runs_of_others_are_damage(run_dir: Path) -> None:
    for name in ("metrics.csv", "result.json", "config.yaml", "error.txt"):
        (run_dir / name).unlink(missing_ok=True)
        os.mkfifo(run_dir / name)
    (found,) = run_reader.read([run_dir])
    assert found.trouble == "config.yaml cannot be read: it is damaged; result.json cannot be read: it is damaged"
    assert found.metrics().empty


def test_numbers_of_earlier_attempts_are_written_in_digits(run_dir: Path) -> None:
    (run_dir / "run-\u00b2.json").write_text("{}", encoding="utf-8")
    (run_dir / "run.json").write_text("", encoding="utf-8")
    assert record.recovered(run_dir)["status"] == "finished"


@pytest.mark.parametrize("how", [*DAMAGES, "gone"])
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "result.json"])
def test_a_finished_run_with_a_damaged_file_is_mended_by_its_own_command(run_dir: Path, name: str, how: str) -> None:
    damage(run_dir / name, how)
    said: list[str] = []
    cfg, overrides = settled(*SAME), ["run.id=A", *SAME]
    todo = continue_run.continued(replace(cfg, run_dir=run_dir), said.append, overrides)
    if name == "result.json" and how != "gone":
        assert todo is not None  # its test is made again
        assert todo.checkpoint == str(run_dir / "checkpoints/step-00000072.ckpt")
        assert said[0].startswith("outputs/A/result.json is damaged (")
        return
    assert not todo
    if name != "result.json":
        (line,) = said
        assert line.startswith(f"outputs/A/{name} is {'missing' if how == 'gone' else 'damaged ('}"), line
        assert len(line) < 250
    before = record.read(run_dir, "run")
    record.repair(replace(cfg, run_dir=run_dir), "A", overrides)
    assert record.read(run_dir, "run")["status"] == "finished"
    if before:
        assert record.read(run_dir, "run") == before
    assert record.settings(run_dir) is not None
    assert not continue_run.continued(settled(*SAME, run_dir=run_dir), pytest.fail, overrides)
    (found,) = run_reader.read([run_dir])
    assert found.status == ("no result" if name == "result.json" else "finished")


@pytest.mark.parametrize("how", [*DAMAGES, "gone"])
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "result.json", "wandb.json"])
def test_an_interrupted_run_with_a_damaged_file_goes_on_from_its_checkpoint(run_dir: Path, name: str, how: str) -> None:
    record.write(run_dir, "wandb", {"id": "A-123456", "finished": False})
    wandb_id = record.read(interrupted(run_dir), "run")["wandb_id"]
    if name == "result.json":
        (run_dir / name).write_text("{}", encoding="utf-8")
    if name != "run.json":
        record.write(run_dir, "run", record.read(run_dir, "run") | {"wandb_id": "A-123456"})
    damage(run_dir / name, how)
    cfg = settled(*SAME, "trainer.max_epochs=3")
    plan = continue_run.continued(replace(cfg, run_dir=run_dir), lambda line: None, ["run.id=A"])
    assert plan is not None
    assert plan.checkpoint == str(run_dir / "checkpoints/step-00000072.ckpt")
    record.begin(plan, "A", ["run.id=A"])
    assert record.read(run_dir, "run")["wandb_id"] == "A-123456" != wandb_id
    assert record.read(run_dir, "run")["attempt"] == 2
    assert record.settings(run_dir) == plan.settings()
    summary.summary(run_dir)
    assert (run_dir / "metrics.csv").exists()


def damage(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))


LOST = {  # settings of another command, a file that cannot be read, and results without a checkpoint
    "config.yaml": r"config\.yaml is damaged \(empty\), so settings cannot be compared; use those",
    "run.json": r"^run\.id=A: .*outputs/A/run\.json: Is a directory; .* move it away$",
    "result.json": r"outputs/A/result\.json is damaged \(empty\), and no intact checkpoint is left",
}


@pytest.mark.parametrize("name", LOST)
def test_what_is_lost_and_cannot_be_recovered_is_named(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    (run_dir / name).mkdir() if name == "run.json" else (run_dir / name).touch()
    if name == "result.json":
        shutil.rmtree(run_dir / "checkpoints")
    more = ["seed=7"] if name == "config.yaml" else []
    with pytest.raises(SettingError, match=LOST[name]):
        continue_run.continued(settled(*SAME, *more, run_dir=run_dir), pytest.fail, [*SAME, *more] if more else None)


def test_a_run_without_its_record_goes_on_and_ends_well(run_dir: Path) -> None:
    interrupted(run_dir)
    (run_dir / "run.json").write_bytes(b"")
    run = train(run_dir.parents[1], "run.id=A", *SAME[:-1], "trainer.max_epochs=3").ended()
    assert "outputs/A/run.json is damaged (empty): recovered from the other files" in run.out
    assert run.json("result")["epochs_before"] == 2
    assert run.json("run")["attempt"] == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_run_that_cannot_begin_again_is_as_it_was(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The disk is full, or mounted read-only, at any of the changes that begin an attempt."""
    before = contents(run_dir)
    cfg = settled(*SAME, "trainer.max_epochs=3")
    assert continue_run.continued(replace(cfg, run_dir=run_dir), lambda line: None)
    for last in range(100):
        left = [last]

        def flush(path: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(atomic_write, "flush", flush)
        try:
            record.begin(replace(cfg, run_dir=run_dir), "A", [])
        except OSError:
            assert contents(run_dir) == before
        else:
            break
    assert last == 8  # four files, and their directory each time
    assert record.undo_begin(run_dir, refused=False)
    assert contents(run_dir) == before


def test_only_a_run_that_has_finished_or_was_refused_is_taken_back(run_dir: Path) -> None:
    cfg = settled(*SAME, "trainer.max_epochs=3")
    for status, trained, refused, taken in (
        ("finished", False, False, True),
        ("finished", True, False, False),
        ("interrupted", False, False, False),
        ("interrupted", False, True, True),
        ("interrupted", True, True, False),
    ):
        copy = Path(shutil.copytree(run_dir, run_dir.with_name("copy")))
        record.end(copy, status)
        record.begin(replace(cfg, run_dir=copy), "A", [])
        if trained:
            record.mark_trained(copy)
        record.end(copy, "failed")
        assert record.undo_begin(copy, refused=refused) == taken
        assert record.read(copy, "run")["status"] == (status if taken else "failed")
        shutil.rmtree(copy)


def test_a_small_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[Any] = []
    monkeypatch.setattr(os, "fsync", lambda file: order.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    record.write(tmp_path, "run", {})
    assert order == [str(tmp_path / ".run.json"), "replace", str(tmp_path)]


def test_a_sweep_with_damaged_jobs_does_the_others_and_marks_them(tmp_path: Path) -> None:
    same = ("-m", *SAME[:-1], "trainer.max_epochs=1", "hydra.sweep.dir=multirun/s", "seed=0,1,2,3")
    train(tmp_path, *same).ended()
    jobs = tmp_path / "multirun/s"
    (jobs / "0/run.json").write_bytes(b"")
    (jobs / "1/result.json").write_text("[]", encoding="utf-8")
    shutil.rmtree(jobs / "1/checkpoints")
    shutil.rmtree(jobs / "2/.hydra")
    shutil.rmtree(jobs / "3")
    again = train(tmp_path, *same).ended(1)
    assert "Traceback" not in again.err
    assert again.err.splitlines()[0].startswith("error: run.id=1: multirun/s/1/result.json is damaged (")
    assert again.err.splitlines()[-1].startswith("error: 1 of 4 jobs failed (job 1); ")
    rows = [line.split(",") for line in (jobs / "sweep.csv").read_text(encoding="utf-8").splitlines()[1:]]
    status = 6
    assert [(row[0], row[status]) for row in rows] == [
        *(("0", "finished"), ("1", "damaged"), ("2", "finished"), ("3", "finished"))
    ]
    assert json.loads((jobs / "0/run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_a_job_whose_directory_is_a_file_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "multirun/s").mkdir(parents=True)
    (tmp_path / "multirun/s/0").write_text("", encoding="utf-8")
    train(tmp_path, "-m", *SAME[:-1], "trainer.max_epochs=1", "hydra.sweep.dir=multirun/s", "seed=0,1").ended()
    # The number 0 is taken, so the jobs have those after it.
    assert {path.parent.name for path in tmp_path.glob("multirun/s/*/run.json")} == {"1", "2"}


# Less than was done


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["trainer.max_epochs=1"], "trainer.max_epochs=1: this run has done 2 epochs; use at least 2, or another id"),
        (["+trainer.max_steps=10"], "trainer.max_steps=10: this run has done 72 steps; use at least that, or"),
        (["+trainer.max_time=00:00:00:20"], "trainer.max_time=00:00:00:20: this run has trained for 30 s; use"),
        (["+trainer.max_time={seconds: 20}"], "trainer.max_time={'seconds': 20}: this run has trained for 30 s; use"),
    ],
)
def test_less_training_than_was_done_is_refused(run_dir: Path, settings: list[str], line: str) -> None:
    interrupted(run_dir)
    change_newest(run_dir, lambda point: point["callbacks"].update(Timer={"time_elapsed": {"train": 30.0}}))
    with pytest.raises(SettingError) as error:
        continue_run.continued(settled(*SAME, *settings, run_dir=run_dir), lambda line: None)
    assert str(error.value).startswith(line)
    for enough in (["+trainer.max_steps=72"], ["+trainer.max_time=00:00:00:31"], ["trainer.max_epochs=2"], []):
        assert continue_run.continued(settled(*SAME, *enough, run_dir=run_dir), lambda line: None)


def test_as_many_epochs_as_were_done_are_too_few_in_the_middle_of_the_next(run_dir: Path) -> None:
    interrupted(run_dir)
    before = settled(*SAME, "trainer.max_epochs=5")
    OmegaConf.save(before.cfg, run_dir / "config.yaml")
    change_newest(run_dir, lambda point: point["resume"].update(epoch_is_over=False))
    with pytest.raises(SettingError, match=r"this run has done 2 epochs and a part of the next; use at least 3"):
        continue_run.continued(settled(*SAME, run_dir=run_dir), lambda line: None)


# Killed, or running


def test_a_run_that_no_process_is_at_was_killed(run_dir: Path) -> None:
    record.write(run_dir, "run", record.read(run_dir, "run") | {"status": "running"})
    assert statuses(run_dir) == ("killed", "killed")
    (found,) = run_reader.read([run_dir])
    assert found.trouble == "it had not ended when this was computed: it was killed"
    lock.hold(run_dir)
    assert statuses(run_dir) == ("running", "running")
    lock.release(run_dir)
    assert statuses(run_dir) == ("killed", "killed")
    (run_dir / ".lock").unlink()  # a copy: nobody knows
    assert statuses(run_dir) == ("running", "running")
    record.write(run_dir, "run", record.read(run_dir, "run") | {"status": "interrupted", "requeued": "17"})
    assert statuses(run_dir) == ("requeued", "requeued")
    assert run_reader.read([run_dir])[0].trouble == "it was interrupted, and Slurm's queue has it again (job 17)"


def statuses(run_dir: Path) -> tuple[str, str]:
    return record.status(run_dir), run_reader.read([run_dir])[0].status


def test_the_table_of_a_sweep_tells_killed_jobs(tmp_path: Path, run_dir: Path) -> None:
    job = tmp_path / "multirun/s/0"
    shutil.copytree(run_dir, job)
    record.write(job, "run", record.read(job, "run") | {"status": "running"})
    assert sweep.summarize(job.parent, Console(quiet=True))
    assert ",killed," in (job.parent / "sweep.csv").read_text(encoding="utf-8")


def test_a_check_does_not_keep_a_run_from_beginning(run_dir: Path) -> None:
    with (run_dir / ".lock").open(encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)

        def free(seconds: float) -> None:
            fcntl.flock(file, fcntl.LOCK_UN)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("syncbn.training.run_directory.lock.time.sleep", free)
            lock.hold(run_dir)
    assert (run_dir / ".lock").read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")
    lock.release(run_dir)
    assert (run_dir / ".lock").read_text(encoding="utf-8") == ""


def test_a_directory_that_was_made_in_vain_is_left_empty_and_its_lock_is_nobodys(tmp_path: Path) -> None:
    run_dir = tmp_path / "a"
    lock.hold(run_dir)
    late = os.open(run_dir / ".lock", os.O_RDWR)  # as another process may have, just before
    lock.release(run_dir)
    assert not list(run_dir.iterdir())
    fcntl.flock(late, fcntl.LOCK_EX)
    lock.hold(run_dir)  # a new lock, not the one that is gone
    assert lock.is_held(run_dir)
    os.close(late)
    assert lock.is_held(run_dir)
    lock.release(run_dir)


# Tables


def test_rows_of_a_damaged_table_are_kept_as_far_as_they_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"loss,step\n1.0,0\n" + bytes(40) + b"\n\xff\xfe,\n0.5,1\n0.2,2,3\n,x\n")
    damaged = path.read_bytes()
    file = MetricsFile(tmp_path)
    file.log_metrics({"loss": 0.1}, 3)
    assert [(row["step"], row["loss"]) for row in read(path)] == [("0", "1.0"), ("1", "0.5"), ("3", "0.1")]
    assert (tmp_path / "damaged-metrics.csv").read_bytes() == damaged
    line = f"{path} is damaged: 2 rows were kept; the damaged file is damaged-metrics.csv\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("how", DAMAGES)
def test_a_table_that_is_something_else_is_begun_anew(tmp_path: Path, how: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(DAMAGES[how](b"loss,step\n1.0,0\n1.0,1\n"))
    file = MetricsFile(tmp_path)
    file.log_metrics({"loss": 0.1}, 3)
    file.cut(5, 9)
    assert read(path)[-1] == {"loss": "0.1", "step": "3"}


def test_lines_of_a_damaged_journal_are_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add(Line("run-1", 0, 0, ["loss"]))
    with journal.path.open("ab") as file:
        file.write(b"\0\0\0\n[1]\n{}\n\xff\n[" + b"\n")
    journal.add(Line("run-1", 1, 1, ["loss"]))
    assert [line.number for line in journal.lines()] == [0, 1]


# Checkpoints of another optimizer


def optimizer(kind: Callable[..., torch.optim.Optimizer], size: int = 2, **options: Any) -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(size)]
    made = kind(weights, lr=0.1, **options)
    sum(weights).backward()  # type: ignore[union-attr]
    made.step()
    return made


def test_the_state_of_another_optimizer_is_told_from_ones_own() -> None:
    sgd, adam = optimizer(torch.optim.SGD, momentum=0.9), optimizer(torch.optim.AdamW)
    rms = optimizer(torch.optim.RMSprop)
    for mine, other in ((sgd, adam), (adam, sgd), (rms, sgd), (rms, adam), (sgd, rms)):
        assert files.other_optimizer([mine.state_dict()], [mine]) is None
        assert "not those of" in (files.other_optimizer([other.state_dict()], [mine]) or "")
    later = adam.state_dict()
    later["param_groups"][0]["an option of a later version"] = 1
    assert files.other_optimizer([later], [adam]) is None
    assert files.other_optimizer([sgd.state_dict()], [optimizer(torch.optim.SGD, 3)]) == (
        "its parameter groups have 2 parameters, and those of this training [3]"
    )
    assert files.other_optimizer([], [sgd]) == "the checkpoint has 0 optimizers, and this training 1"
