"""Which run a command works in, and that it changes no other: ckpt_path, run.id, hydra.run.dir, mode, settings."""

import itertools
import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from syncbn.training.checkpoint import continue_run, files
from syncbn.training.config.plan import Plan
from syncbn.training.errors import SettingError
from syncbn.training.launch import check_directories
from syncbn.training.run_directory import lock, paths, record
from tests.training.support.settled_config import settled
from tests.training.support.train_command import Run, contents, train

QUICK = ("model=mlp", "logger=csv", "trainer.devices=1")
SAME = (*QUICK, "trainer.max_epochs=2")
CHANGES = {
    "same": (),
    "more": ("trainer.max_epochs=3",),
    "optimizer": ("optimizer=adamw",),
    "seed": ("seed=1",),
    "model": ("model.width=32",),
}
STATUSES = ("finished", "interrupted", "killed", "held")
CHECKPOINTS = ("none", "best", "last", "step", "foreign", "weights", "missing", "damaged")
# By which settings the run is named: run.id, hydra.run.dir.
NAMES: dict[str, tuple[str | None, str | None]] = {
    "": (None, None),
    "id A": ("A", None),
    "id B": ("B", None),
    "id begun": ("begun", None),  # began from A's best.ckpt, and was interrupted
    "id done": ("done", None),  # the same, and has finished
    "dir A": (None, "outputs/A"),
    "dir other": (None, "elsewhere/other"),
    "id B, dir A": ("B", "outputs/A"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which run A has finished."""
    where = tmp_path_factory.mktemp("base")
    train(where, "run.id=A", *SAME).ended()
    return where


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be changed, as the working directory."""
    shutil.copytree(base / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stamp(path: Path) -> tuple[int, int, int]:
    """What any change of a file changes."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def stamps() -> dict[Path, tuple[int, int, int]]:
    """The stamps of all files of runs but for the locks, which a refused command may take for a moment."""
    return {path: stamp(path) for path in Path("outputs").rglob("*") if path.is_file() and path.name != ".lock"}


@cache
def settings(change: str) -> DictConfig:
    return settled(*SAME, *CHANGES[change]).settings()


@cache
def plan_of(change: str, ckpt_path: str | None, mode: str, run_id: str | None) -> Plan:
    cfg = settings(change)
    cfg.ckpt_path, cfg.mode, cfg.run.id = ckpt_path, mode, run_id
    return Plan.of(cfg, Path("somewhere"))


@cache
def parsed(text: str) -> DictConfig:
    found = OmegaConf.create(text)
    assert isinstance(found, DictConfig)
    OmegaConf.set_readonly(found, True)  # all combinations share it
    return found


class ParsedOnce(OmegaConf):
    """Parses each ``config.yaml`` once: 60 ms, and most combinations read one."""

    create = staticmethod(parsed)  # type: ignore[assignment]


@pytest.fixture
def each_file_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses each ``config.yaml`` and loads each checkpoint once, as long as the file stays as it is."""

    @cache
    def once(path: Path, stamp: tuple[int, int, int]) -> Any:
        return load(path)

    load = files.load
    monkeypatch.setattr(files, "load", lambda path: once(path, stamp(path)))
    monkeypatch.setattr(record, "OmegaConf", ParsedOnce)


def of_another_run(name: str, status: str) -> None:
    run_dir = Path(shutil.copytree("outputs/A", f"outputs/{name}"))
    begun = {"id": name, "begun_from": str(Path("outputs/A/checkpoints/best.ckpt").resolve()), "status": status}
    record.write(run_dir, "run", record.read(run_dir, "run") | begun)
    if status != "finished":
        (run_dir / "result.json").unlink()


def prepare(status: str) -> dict[str, str | None]:
    """Puts A into this status; what ``ckpt_path`` is for each kind of checkpoint."""
    of_another_run("begun", "interrupted")
    of_another_run("done", "finished")
    a = Path("outputs/A")
    if status != "finished":
        (a / "result.json").unlink()
        said = {"killed": "running", "held": "running"}.get(status, status)
        record.write(a, "run", record.read(a, "run") | {"status": said})
    shutil.copy(a / "checkpoints/best.ckpt", "foreign.ckpt")
    checkpoint = torch.load("foreign.ckpt", weights_only=True)
    torch.save({"state_dict": checkpoint["state_dict"]}, "weights.ckpt")
    Path("damaged.ckpt").write_bytes(Path("foreign.ckpt").read_bytes()[:5000])
    step = min(str(path) for path in (a / "checkpoints").glob("step-*.ckpt"))  # of the first epoch
    own = {name: f"outputs/A/checkpoints/{name}.ckpt" for name in ("best", "last")} | {"step": step}
    return {"none": None, **own, **{name: f"{name}.ckpt" for name in ("foreign", "weights", "missing", "damaged")}}


def decided(plan: Plan, hydra_dir: str | None, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path | None]:
    """What the program does with these settings, and where: as train.py decides it, but for Hydra."""
    at_exit: list[tuple[Any, ...]] = []
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    try:
        return _decided(plan, hydra_dir)
    finally:
        for call, *arguments in at_exit:
            call(*arguments)


def _decided(plan: Plan, hydra_dir: str | None) -> tuple[str, Path | None]:
    cfg = plan.cfg
    path = hydra_dir or paths.run_dir("outputs", cfg.run.id, cfg.ckpt_path, cfg.mode)
    try:
        check_directories._check_run(OmegaConf.create({"run": cfg.run, "study": None, "hydra": {"run": {"dir": path}}}))
        lock.hold(Path(path))
        try:
            named = cfg.run.id is not None or hydra_dir is not None
            todo = continue_run.continued(replace(plan, run_dir=Path(path)), lambda line: None, named=named)
        finally:
            lock.release(Path(path))
    except SettingError as error:
        return ("refused" if "\n" not in str(error) else f"more lines: {error}"), None
    if todo is None:
        return "done", Path(path)
    if cfg.mode == "test":
        return "tests", Path(path)
    own = todo.checkpoint is not None and paths.run_of(Path(todo.checkpoint)) == Path(path).resolve()
    return "continues" if own else f"new, {todo.restore}", Path(path)


def expected(checkpoint: str, name: str, mode: str, status: str, change: str) -> str:
    """The rules of docs/guide/run_directory.md, once more."""
    run_id, directory = NAMES[name]
    of_a = checkpoint in ("best", "last", "step")
    if name == "id B, dir A" or checkpoint in ("missing", "damaged"):
        return "refused"
    works_in_a = "A" in (run_id, directory and Path(directory).name) or (not name and of_a and mode == "train")
    if works_in_a and status == "held":
        return "refused"
    if mode == "test":
        return "refused" if works_in_a or run_id in ("begun", "done") else "tests"
    if works_in_a or run_id in ("begun", "done"):
        if not (checkpoint == "none" or (of_a and works_in_a) or (checkpoint == "best" and not works_in_a)):
            return "refused"  # it did not begin from that
        if run_id == "done" or (works_in_a and status == "finished"):
            return {"same": "done", "more": "continues"}.get(change, "refused")
        return "refused" if not name and change not in ("same", "more") else "continues"
    if checkpoint == "none":
        return "new, None"
    if checkpoint == "weights" or (of_a and change not in ("same", "more")):
        return "new, weights"
    over = change != "more" and checkpoint != "step"  # as many epochs as there are to train
    return "refused" if over else "new, all"


@pytest.mark.usefixtures("each_file_read_once")
@pytest.mark.parametrize("status", STATUSES)
def test_every_combination_works_where_it_says_and_changes_no_other_run(
    here: Path, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("syncbn.training.run_directory.lock.time.sleep", lambda seconds: None)
    checkpoints = prepare(status)
    before = {name: contents(here / "outputs" / name) for name in ("A", "begun", "done")}
    if status == "held":
        lock.hold(Path("outputs/A").resolve())
        before["A"] = contents(here / "outputs/A")
    files, tried = stamps(), set()
    wandb_ids = {json.loads(each["run.json"])["wandb_id"] for each in before.values()}
    for checkpoint, name, mode, change in itertools.product(CHECKPOINTS, NAMES, ("train", "test"), CHANGES):
        if checkpoint == "none" and mode == "test":  # refused before, in test_precise_statistics.py
            continue
        if status != "finished" and change in ("seed", "model"):  # settings differ, as with another optimizer
            continue
        cell = (checkpoint, name, mode, status, change)
        run_id, hydra_dir = NAMES[name]
        plan = plan_of(change, checkpoints[checkpoint], mode, run_id)
        what, where = decided(plan, hydra_dir, monkeypatch)
        assert what == expected(*cell), cell
        tried.add(what)
        if what.startswith(("new", "tests")):
            assert where is not None
            record.begin(replace(plan, run_dir=where), where.name, [])
            assert record.read(where, "run")["wandb_id"] not in wandb_ids, cell
            shutil.rmtree(where)
        assert stamps() == files, cell
    assert {each: contents(here / "outputs" / each) for each in before} == before
    lock.release(Path("outputs/A").resolve())
    assert tried >= {"refused", "continues", "new, None", "new, all", "new, weights", "tests"}
    assert {path.name for path in (here / "outputs").iterdir()} == {*before}  # refused ones leave nothing


def unchanged(run: Run, where: Path, before: dict[str, bytes], *, line: str) -> None:
    assert run.code == 1
    assert run.err.startswith(f"error: {line}"), run.err
    assert run.err.count("\n") == 1
    assert contents(where / "outputs/A") == before


def test_a_finished_run_is_left_alone_by_a_run_that_begins_from_it(here: Path) -> None:
    before = contents(here / "outputs/A")
    begins = ("ckpt_path=outputs/A/checkpoints/best.ckpt", "optimizer=adamw")
    second = train(here, "run.id=B", *begins, *SAME).ended()
    assert "this run begins with the weights of outputs/A/checkpoints/best.ckpt, at epoch 1, as settings differ: " in (
        second.out
    )
    assert second.directory == here / "outputs/B"
    assert second.json("result")["epochs"] == 2
    assert second.json("result")["epochs_before"] == 0
    assert contents(here / "outputs/A") == before
    first = torch.load(here / "outputs/B/checkpoints/step-00000036.ckpt", weights_only=True)
    assert {*first["optimizer_states"][0]["state"][0]} == {"step", "exp_avg", "exp_avg_sq"}

    again = train(here, "run.id=B", *begins, *SAME)
    assert again.out.startswith("run B has finished before")
    best = "outputs/A/checkpoints/best.ckpt"
    seed = train(here, "ckpt_path=outputs/A/checkpoints/best.ckpt", "seed=1", *SAME)
    unchanged(
        seed, here, before, line="ckpt_path=outputs/A/checkpoints/best.ckpt: run A has finished with other settings"
    )
    assert "seed=0 -> 1" in seed.err
    assert "run.id=NAME begins another run from that checkpoint" in seed.err
    whole = train(here, "run.id=C", *begins, *QUICK, "trainer.max_epochs=3", "ckpt_restore=all")
    unchanged(whole, here, before, line=f"ckpt_path={here}/outputs/A/checkpoints/best.ckpt: it was saved with an")
    assert "not those of AdamW); use that one, or begin another run with its weights" in whole.err
    model = train(here, "run.id=D", *begins, *SAME, "model.width=32")
    unchanged(model, here, before, line=f"ckpt_path={here / best}: it is not of this model")
    train(here, "-m", "hydra.sweep.dir=multirun/s", *begins, *SAME, "seed=0,1").ended()
    assert contents(here / "outputs/A") == before
    train(here, "mode=test", begins[0], "logger=csv", "run.id=T").ended()
    assert contents(here / "outputs/A") == before


def test_a_run_that_continues_another_one_has_its_epochs_and_its_optimizer(here: Path) -> None:
    before = contents(here / "outputs/A")
    more = (*QUICK, "trainer.max_epochs=4")
    run = train(here, "run.id=B", "ckpt_path=outputs/A/checkpoints/last.ckpt", *more).ended()
    assert "this run continues the training of outputs/A/checkpoints/last.ckpt: weights, optimizer, epoch" in run.out
    assert run.json("result")["epochs_before"] == 2
    assert contents(here / "outputs/A") == before
    train(here, "run.id=A", *more).ended()
    ends = [torch.load(here / f"outputs/{name}/checkpoints/last.ckpt", weights_only=True) for name in "AB"]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("norm.only=bn9",), "error: run.id=A: this run has finished with other settings"),
        (("callbacks.statistics._target_=builtins.zip",), "error: rank 0 of 1 (pid "),
        (("logger=wandb", "logger.mode=online"), "error: logger.mode=online: W&B says: "),
    ],
)
def test_a_finished_run_stays_finished_where_more_epochs_cannot_begin(
    here: Path, settings: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(here / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    before = contents(here / "outputs/A")
    run = train(here, "run.id=A", *QUICK, "trainer.max_epochs=4", *settings).ended(1)
    assert run.err.startswith(line), run.err
    assert run.err.count("\n") == 1
    after = contents(here / "outputs/A")
    assert after["train.log"].startswith(before["train.log"])  # the log of all attempts
    of_the_attempt = {"error.txt", "ranks/0.stacks", "train.log"}
    assert {name: after.get(name) for name in before.keys() - of_the_attempt} == {
        name: before[name] for name in before.keys() - of_the_attempt
    }
    assert after.keys() - before.keys() <= of_the_attempt
    more = train(here, "run.id=A", *QUICK, "trainer.max_epochs=3").ended()  # and it can be continued still
    assert more.json("result")["epochs"] == 3


def test_files_that_are_no_checkpoints_are_named_with_what_works(here: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, "bare.ckpt")
    torch.save([1, 2], "list.ckpt")
    torch.save({"state_dict": {}, "loops": {}}, "loops.ckpt")
    for file, more, line in (
        ("bare.ckpt", (), r"ckpt_path=bare.ckpt: it has no state_dict; use a checkpoint of Lightning, or a file that "),
        ("list.ckpt", (), r"ckpt_path=list.ckpt: no checkpoint of a training run can be read .*it holds a list"),
        ("loops.ckpt", ("ckpt_restore=all",), r"ckpt_restore=all: loops.ckpt has no optimizer_states, lr_schedulers, "),
        ("outputs", (), r"ckpt_path=outputs: this is a directory; "),
        (f"{'n' * 300}.ckpt", (), r"ckpt_path=n+\.ckpt: there is no such file; "),
    ):
        cfg = settled(*SAME, f"ckpt_path={file}", *more)
        with pytest.raises(SettingError, match=f"^{line}"):
            continue_run.continued(replace(cfg, run_dir=Path("outputs/new")), pytest.fail)
    assert not Path("outputs/new").exists()
