"""One metrics.csv and one W&B run, whatever happens to the attempts at it and to the server."""

import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from omegaconf import OmegaConf
from PIL import Image

from syncbn.training.loggers import chosen, wandb_files, wandb_internals
from syncbn.training.loggers.csv_logger import read
from syncbn.training.loggers.wandb_logger import STEP
from syncbn.training.run_directory import record
from tests.support.refuses import refuses
from tests.support.warm_process import REPO
from tests.training.support import wandb_log
from tests.training.support.attempt import ID, attempt
from tests.training.support.train_command import Run, environment, run, train
from tests.training.support.wandb_server import WandbServer


@pytest.fixture(autouse=True)
def own_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process of W&B's for each test: it keeps the settings that it was started with."""
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def killed(run_dir: Path, **settings: Any) -> None:
    """An attempt in a process of its own, which ends with a kill."""
    program = REPO / "tests" / "training" / "support" / "attempt.py"
    ended = run(REPO, sys.executable, str(program), str(run_dir), json.dumps(settings), env=environment(), timeout=120)
    assert ended.code == -9, ended.err


def points(lines: list[dict[str, Any]], step: str) -> dict[tuple[int, str], float]:
    """What was logged by step and name, each once; but for the epoch, which stands in several lines of a step."""
    found = [
        (int(line[step]), name, float(value))
        for line in lines
        for name, value in line.items()
        if value != "" and name != step and name[0] != "_" and name != "epoch"
    ]
    assert max(Counter((at, name) for at, name, _ in found).values()) == 1
    return {(at, name): value for at, name, value in found}


def csv_points(run_dir: Path) -> dict[tuple[int, str], float]:
    return points(read(run_dir / "metrics.csv"), "step")


def wandb_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for directory in wandb_files.directories(run_dir) for line in wandb_internals.history(directory)]


def upload(run_dir: Path) -> Run:
    options, directories = wandb_files.upload(run_dir)
    command = [sys.executable, "-m", "wandb", *options, *map(str, directories)]
    return run(run_dir, *command, env=environment(), timeout=120)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], float]:
    """What a run that nothing interrupts leaves."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    attempt(run_dir)
    found = csv_points(run_dir)
    assert points(wandb_lines(run_dir), STEP) == found
    assert len(found) == 20 * 2 + 4 * 2
    return found


@pytest.mark.parametrize(("saved", "died"), [(11, 17), (8, 14), (9, 11)])
def test_a_killed_run_goes_on_and_has_every_point_once(
    tmp_path: Path, straight: dict[tuple[int, str], float], saved: int | None, died: int
) -> None:
    killed(tmp_path / "run", save_at=saved, killed_at=died)
    assert max(int(row["step"]) for row in read(tmp_path / "run/metrics.csv")) == died
    attempt(tmp_path / "run")
    assert csv_points(tmp_path / "run") == straight
    lines = wandb_lines(tmp_path / "run")
    assert points(lines, STEP) == straight
    for counter in (STEP, "_step"):
        counts = [line[counter] for line in lines]
        assert counts == sorted(counts), counter
    assert len({line["_step"] for line in lines}) == len(lines)


def test_attempts_of_one_run_are_uploaded_together_with_no_line_twice(
    tmp_path: Path, straight: dict[tuple[int, str], float], server: WandbServer
) -> None:
    killed(tmp_path / "run", save_at=3, killed_at=6)
    killed(tmp_path / "run", save_at=11, killed_at=14)
    attempt(tmp_path / "run")
    options, directories = wandb_files.upload(tmp_path / "run")
    assert options == ["sync"]
    done = upload(tmp_path / "run")
    assert done.err.count("Finished syncing") == len(directories) > 0, done.err
    lines = server.lines()
    assert points(lines, STEP) == straight
    assert [line["_step"] for line in lines] == sorted({line["_step"] for line in lines})
    (summary,) = server.lines("wandb-summary.json")
    assert summary[STEP] == 19
    assert summary["done"] == 20
    assert wandb_files.upload(tmp_path / "run")[1] == []


def test_a_log_that_cannot_be_read_back_costs_points_twice_and_loses_none(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(tmp_path / "run", steps=10)
    monkeypatch.setattr(wandb_internals, "history", lambda directory: [])
    attempt(tmp_path / "run")
    upload(tmp_path / "run")
    logged = {*csv_points(tmp_path / "run")}
    names = {name for _, name in logged}
    times = Counter((int(line[STEP]), name) for line in server.lines() for name in names & {*line})
    assert {*times} == logged
    assert {point for point, number in times.items() if number == 2} == {(n, name) for n, name in logged if n < 10}


@pytest.mark.parametrize("written", [True, False])
def test_what_came_into_wandbs_files_is_not_logged_again_and_what_did_not_is(
    tmp_path: Path, straight: dict[tuple[int, str], float], written: bool
) -> None:
    """W&B's process may, or may not, write down its last lines when its rank is killed."""
    attempt(tmp_path / "run", steps=10, save_at=6)
    (first,) = wandb_files.directories(tmp_path / "run")
    if not written:
        os.truncate(next(first.glob("*.wandb")), wandb_internals.HEADER)
    attempt(tmp_path / "run")
    assert csv_points(tmp_path / "run") == straight
    assert points(wandb_lines(tmp_path / "run"), STEP) == straight
    assert [line["_step"] for line in wandb_lines(tmp_path / "run")] == list(range(28))
    assert (first in wandb_files.upload(tmp_path / "run")[1]) == written


@pytest.mark.parametrize("written", [True, False])
def test_a_run_that_was_killed_after_its_test_has_it_once_and_what_wandb_lacked(
    tmp_path: Path, straight: dict[tuple[int, str], float], written: bool
) -> None:
    killed(tmp_path / "run", save_at=19, killed_at=20, tests=True)
    (first,) = wandb_files.directories(tmp_path / "run")
    if not written:
        os.truncate(next(first.glob("*.wandb")), wandb_internals.HEADER)
    before = (tmp_path / "run/metrics.csv").read_bytes()
    attempt(tmp_path / "run", tests=True)
    assert (tmp_path / "run/metrics.csv").read_bytes() == before
    assert csv_points(tmp_path / "run") == straight | {(20, "test/acc"): 0.5}
    assert points(wandb_lines(tmp_path / "run"), STEP) == csv_points(tmp_path / "run")


def test_a_run_that_only_tests_again_leaves_metrics_as_they_were_and_says_that_it_trained_before(
    tmp_path: Path,
) -> None:
    same = ("run.id=a", "model=mlp", "trainer.max_epochs=1", "logger=csv")
    first = train(tmp_path, *same)
    assert first.code == 0, first.err
    assert first.directory is not None
    before = (first.directory / "metrics.csv").read_bytes()
    record.write(first.directory, "run", first.json("run") | {"status": "running"})  # as if killed before the end
    again = train(tmp_path, *same)
    assert again.code == 0, again.err
    assert (first.directory / "metrics.csv").read_bytes() == before
    assert again.json("result")["test"] == first.json("result-1")["test"]
    assert " s, 1 epoch, 18 steps, all of them before\n" in re.sub(" +\n", "\n", again.out)


def test_a_run_from_a_checkpoint_of_another_has_a_wandb_run_and_metrics_of_its_own(tmp_path: Path) -> None:
    attempt(tmp_path / "base", steps=10, save_at=9)
    shutil.copytree(tmp_path / "base", tmp_path / "run", ignore=shutil.ignore_patterns("metrics.csv", "wandb*"))
    attempt(tmp_path / "run", about={"wandb_id": "another", "goes_on_from": str(tmp_path / "base")})
    (directory,) = wandb_files.directories(tmp_path / "run")
    assert directory.name.endswith("-another")
    assert wandb_files.upload(tmp_path / "run")[1] == [directory]
    found = csv_points(tmp_path / "run")
    assert {step for step, _ in found} == set(range(10, 20))
    assert points(wandb_internals.history(directory), STEP) == found
    assert [line["_step"] for line in wandb_internals.history(directory)] == list(range(14))


def test_names_with_brackets_are_names_like_others(tmp_path: Path) -> None:
    attempt(tmp_path / "x[a] b", steps=3, about={"wandb_id": "x[a] b"})
    (directory,) = wandb_files.directories(tmp_path / "x[a] b")
    assert len(wandb_internals.history(directory)) == 3
    run = wandb_log.run(directory)
    assert (run["run_id"], run["display_name"]) == ("x[a] b", "x[a] b")


def test_a_run_goes_on_online(tmp_path: Path, straight: dict[tuple[int, str], float], server: WandbServer) -> None:
    killed(tmp_path / "run", save_at=8, killed_at=14, mode="online")
    attempt(tmp_path / "run", mode="online")
    assert csv_points(tmp_path / "run") == straight
    assert points(server.lines(), STEP) == straight
    assert record.read(tmp_path / "run", "wandb")["url"].endswith(f"/runs/{ID}")
    assert wandb_files.upload(tmp_path / "run")[1] == []


def test_a_server_that_does_not_answer_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start = time.monotonic()
    attempt(tmp_path / "run", mode="online", init_timeout=2)
    assert time.monotonic() - start < 60
    said = capfd.readouterr().err
    assert re.fullmatch(
        r"W&B cannot be reached \(.*127\.0\.0\.1:9.*\): the run is kept offline; upload it .*\n", said
    ), said
    about = record.read(tmp_path / "run", "wandb")
    assert about == {"id": ID, "mode": "offline", "asked": "online", "url": None, "finished": True}
    options, (directory,) = wandb_files.upload(tmp_path / "run")
    assert options == ["sync"]
    assert len(wandb_internals.history(directory)) == 28


def test_an_attempt_that_was_kept_offline_is_uploaded_before_a_later_one_is_online(
    tmp_path: Path, straight: dict[tuple[int, str], float], server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    attempt(tmp_path / "run", steps=5, save_at=4)
    attempt(tmp_path / "run", steps=10, save_at=9, mode="online")
    assert "earlier attempts of this run are not uploaded to W&B yet: the run is kept" in capfd.readouterr().err
    assert server.lines() == []
    upload(tmp_path / "run")
    attempt(tmp_path / "run", mode="online")
    assert points(server.lines(), STEP) == straight
    assert [line["_step"] for line in server.lines()] == list(range(28))


@pytest.mark.parametrize("gone", [404, None])
def test_a_server_that_goes_away_is_not_waited_for_and_what_it_lacks_can_be_uploaded(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, gone: int | None
) -> None:
    """404 ends W&B's sending at once; a port that nobody listens on any more is tried until finish_timeout."""
    real = wandb.Run.log
    lines = []

    def log(self: Any, *arguments: Any, **options: Any) -> None:
        lines.append(arguments)
        if len(lines) == 10:
            if gone is None:
                server.shutdown()
                server.server_close()
            server.refuse = gone
        real(self, *arguments, **options)

    monkeypatch.setattr(wandb.Run, "log", log)
    start = time.monotonic()
    attempt(tmp_path / "run", mode="online", finish_timeout=4)
    assert time.monotonic() - start < 60
    options, directories = wandb_files.upload(tmp_path / "run")
    assert options == ["sync", "--include-online"]
    assert [len(wandb_internals.history(directory)) for directory in directories] == [28]


@pytest.mark.parametrize("refusal", [401, 403])
def test_a_server_that_refuses_is_a_setting_error(tmp_path: Path, server: WandbServer, refusal: int) -> None:
    server.refuse = refusal
    with refuses("logger.mode", "online", "W&B says: ", f" {refusal}: ", "; use logger.mode=offline"):
        attempt(tmp_path / "run", mode="online")


@pytest.mark.parametrize("key", [None, "short"])
def test_not_being_logged_in_is_a_setting_error_also_without_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with refuses("logger.mode", "online", "W&B says: ", "API key", "; use logger.mode=offline"):
        attempt(tmp_path / "run", mode="online")


def test_a_stop_that_will_go_on_is_marked_as_such(tmp_path: Path, server: WandbServer) -> None:
    attempt(tmp_path / "run", steps=3, preempted=True, mode="online")
    assert any(request.get("preempting") for request in server.requests)
    assert [request["exitcode"] for request in server.requests if request.get("complete")] == [1]


def test_pictures_and_if_asked_the_best_checkpoint_are_logged(tmp_path: Path) -> None:
    """The artifact of an offline run refers to the file in the run directory: W&B's own directory has no copy."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    best = run_dir / "checkpoints/best.ckpt"
    torch.save({"epoch": 3}, best)
    Image.new("RGB", (4, 3)).save(run_dir / "curves.png")
    result = {"checkpoint": str(best), "monitored": {"val/acc": 0.5}, "test": {"test/acc": 0.25}}
    attempt(run_dir, steps=2, result=result, log_model="best")
    (directory,) = wandb_files.directories(run_dir)
    last = wandb_internals.history(directory)[-1]
    assert last["pictures/curves.width"] == 4
    assert (directory / "files" / last["pictures/curves.path"]).read_bytes() == (run_dir / "curves.png").read_bytes()
    (artifact,) = [each["artifact"] for each in wandb_log.records(directory) if "artifact" in each]
    assert (artifact["name"], artifact["type"]) == (f"{ID}-best", "model")
    assert sorted(artifact["aliases"]) == ["best", "latest"]  # W&B keeps them as a set
    assert [each["local_path"] for each in artifact["manifest"]["contents"]] == [str(best)]
    about = {"norm": "sync", "epoch": 3, "metric": "val/acc", "value": 0.5, "test/acc": 0.25}
    assert json.loads(artifact["metadata"]) == about


def test_several_loggers_are_composed_and_checked() -> None:
    config = {"name": "wandb", "mode": "offline", "tensorboard": {"pictures": True}, "mine": {"_target_": "a.B"}}
    assert chosen.names(config) == ["wandb", "tensorboard", "mine"]
    assert chosen.names({"name": "csv"}) == chosen.names({"csv": True}) == []  # of an earlier version, and today's
    assert chosen.names({"name": "wandb", "mode": "disabled"}) == []


def test_a_logger_that_is_not_installed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "find_spec", lambda name: None)
    for name, command in {"tensorboard": "pip install tensorboard", "mlflow": "pip install mlflow-skinny"}.items():
        with refuses("logger", name, f"there is no package {name} here; {command}"):
            chosen.check(OmegaConf.create({name: {"tracking_uri": "sqlite:///a.db"}}))
