"""TensorBoard and MLflow have each metric of a step once, whatever happens to the attempts; and how the run ended."""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from syncbn.training.loggers import mlflow_logger, run_loggers
from syncbn.training.loggers.csv_logger import read
from syncbn.training.run_directory import record
from tests.support.refuses import refuses
from tests.support.warm_process import REPO
from tests.training.support.attempt import attempt
from tests.training.support.train_command import environment, run, train

Points = dict[tuple[int, str], float]


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow sets the variable for its own process."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def loggers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both loggers; the database is made once, which takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    settings = {"tracking_uri": uri, "experiment": "mine", "group": None, "tags": {"a": "b"}}
    return {
        "tensorboard": {"pictures": True},
        "mlflow": {**settings, "pictures": True, "log_model": "best"},
    }


def killed(run_dir: Path, **settings: Any) -> None:
    program = REPO / "tests" / "training" / "support" / "attempt.py"
    ended = run(REPO, sys.executable, str(program), str(run_dir), json.dumps(settings), env=environment(), timeout=120)
    assert ended.code == -9, ended.err
    second = int(time.time())
    while int(time.time()) == second:  # TensorBoard sorts files by the second in their names
        time.sleep(0.02)


def once(found: list[tuple[int, str, float]]) -> Points:
    """The points but for the epoch, which stands in several rows of a step; each may be there once."""
    found = [each for each in found if each[1] != "epoch"]
    assert max(Counter((step, name) for step, name, _ in found).values()) == 1
    return {(step, name): value for step, name, value in found}


def in_csv(run_dir: Path) -> Points:
    rows = [(int(row.pop("step")), row) for row in read(run_dir / "metrics.csv")]
    return once([(step, name, float(value)) for step, row in rows for name, value in row.items() if value])


def events(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return found


def in_tensorboard(run_dir: Path) -> Points:
    found = events(run_dir)
    points = [(each.step, tag, each.value) for tag in found.Tags()["scalars"] for each in found.Scalars(tag)]
    for tag in found.Tags()["scalars"]:
        steps = [each.step for each in found.Scalars(tag)]
        assert steps == sorted(steps), tag
    return once(points)


def mlflow_run(run_dir: Path) -> tuple[MlflowClient, Any]:
    about = record.read(run_dir, "mlflow")
    client = MlflowClient(about["tracking_uri"])
    return client, client.get_run(about["run_id"])


def in_mlflow(run_dir: Path) -> Points:
    client, found = mlflow_run(run_dir)
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    points = [(each.step, name, each.value) for name, history in histories.items() for each in history]
    return once([each for each in points if not each[1].startswith("result/")])


def check(run_dir: Path, points: Points) -> None:
    assert in_csv(run_dir) == points
    assert in_tensorboard(run_dir) == pytest.approx(points)  # float32
    assert in_mlflow(run_dir) == points


def texts(run_dir: Path, tag: str) -> list[str]:
    found = events(run_dir)
    return [each.tensor_proto.string_val[0].decode() for each in found.Tensors(f"{tag}/text_summary")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, loggers: dict[str, Any]) -> Path:
    """A run that nothing interrupts, with a picture and a best checkpoint."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints/best.ckpt").write_text("weights", encoding="utf-8")
    Image.new("RGB", (4, 3)).save(run_dir / "curves.png")
    attempt(run_dir, loggers=loggers, result={"checkpoint": str(run_dir / "checkpoints/best.ckpt")})
    return run_dir


def test_both_have_settings_metrics_pictures_results_and_the_status(straight: Path) -> None:
    check(straight, in_csv(straight))
    assert len(in_csv(straight)) == 20 * 2 + 4 * 2
    assert texts(straight, "status") == ["finished"]
    assert "name: sync" in texts(straight, "config")[0]
    image = events(straight).Images("pictures/curves")[0]
    assert (image.width, image.height, image.step) == (4, 3, 19)
    client, found = mlflow_run(straight)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.data.params["norm.name"] == "sync"
    assert found.data.params["logger.tensorboard.pictures"] == "True"
    assert {"norm": "sync", "world_size": "1", "a": "b"}.items() <= found.data.tags.items()
    assert found.data.metrics["result/done"] == 20
    paths = [
        each.path for name in ("pictures", "checkpoint") for each in client.list_artifacts(found.info.run_id, name)
    ]
    assert paths == ["pictures/curves.png", "checkpoint/best.ckpt", "checkpoint/metadata.json"]


def test_a_killed_run_continues_and_has_every_point_once(
    tmp_path: Path, straight: Path, loggers: dict[str, Any]
) -> None:
    run_dir = tmp_path / "run"
    killed(run_dir, save_at=8, killed_at=14, loggers=loggers)
    before = in_tensorboard(run_dir), in_mlflow(run_dir)
    assert max(step for step, _ in before[0]) == max(step for step, _ in before[1]) == 14
    first = record.read(run_dir, "mlflow")["run_id"]
    run_loggers.mark_failed(OmegaConf.create(), run_dir, "interrupted")  # as its launcher does
    assert mlflow_run(run_dir)[1].info.status == "KILLED"
    attempt(run_dir, loggers=loggers)
    check(run_dir, in_csv(straight))
    assert record.read(run_dir, "mlflow")["run_id"] == first
    assert mlflow_run(run_dir)[1].info.status == "FINISHED"
    assert texts(run_dir, "status") == ["interrupted", "finished"]


def test_a_run_that_was_killed_after_its_test_has_it_once(
    tmp_path: Path, straight: Path, loggers: dict[str, Any]
) -> None:
    killed(tmp_path / "run", save_at=19, killed_at=20, tests=True, loggers=loggers)
    attempt(tmp_path / "run", tests=True, loggers=loggers)
    check(tmp_path / "run", in_csv(straight) | {(20, "test/acc"): 0.5})


def test_a_run_that_starts_over_has_no_point_of_the_attempt_before(tmp_path: Path, loggers: dict[str, Any]) -> None:
    attempt(tmp_path / "run", steps=5, loggers={"tensorboard": loggers["tensorboard"]})
    (tmp_path / "run/metrics.csv").unlink()
    attempt(tmp_path / "run", steps=3, loggers={"tensorboard": loggers["tensorboard"]}, begins=True)
    assert in_tensorboard(tmp_path / "run") == pytest.approx(in_csv(tmp_path / "run"))
    assert {step for step, _ in in_csv(tmp_path / "run")} == {0, 1, 2}


def test_changed_settings_of_a_resumed_run_are_tags(tmp_path: Path, loggers: dict[str, Any]) -> None:
    attempt(tmp_path / "run", steps=2, save_at=1, loggers=loggers)
    changed = loggers | {"mlflow": loggers["mlflow"] | {"log_model": False}}
    attempt(tmp_path / "run", steps=4, loggers=changed)
    _, found = mlflow_run(tmp_path / "run")
    assert found.data.params["logger.mlflow.log_model"] == "best"
    assert found.data.tags["logger.mlflow.log_model"] == "False"


def test_a_logger_that_fails_in_the_middle_costs_one_warning(
    tmp_path: Path, loggers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, calls = MlflowClient.log_batch, []

    def log_batch(self: MlflowClient, *arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) > 5:
            raise ConnectionError("server is gone")
        return real(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    attempt(tmp_path / "run", loggers=loggers)
    assert len(in_csv(tmp_path / "run")) == 48
    assert in_tensorboard(tmp_path / "run") == pytest.approx(in_csv(tmp_path / "run"))
    assert capfd.readouterr().err == (
        "logger mlflow failed and gets no more metrics; training continues, metrics.csv has all "
        "(ConnectionError: server is gone)\n"
    )
    assert len(calls) == 6


def test_a_server_that_is_not_there_is_refused_before_training_but_does_not_end_a_run_that_has_trained(
    tmp_path: Path, loggers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = {"mlflow": loggers["mlflow"] | {"tracking_uri": "http://127.0.0.1:9"}}
    with refuses("logger.mlflow.tracking_uri", "http://127.0.0.1:9", "MLflow says: ", "127.0.0.1", "or logger=csv"):
        attempt(tmp_path / "run", loggers=away)
    attempt(tmp_path / "run", loggers=away, about={"attempt": 2})
    assert len(in_csv(tmp_path / "run")) == 48
    assert capfd.readouterr().err.count("logger mlflow failed") == 1


def test_a_run_whose_rank_0_is_killed_and_the_same_command_again_leave_one_run_without_noise(tmp_path: Path) -> None:
    custom = "+logger.mine={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: mine}"
    kill = f"+callbacks.fault={{_target_: faults.Fault, what: kill, once: {tmp_path / 'once'}, epoch: 1, batch: 5}}"
    command = ("logger=[tensorboard,mlflow]", custom, kill, "model=mlp", "trainer.max_epochs=2", "run.id=a")
    run_dir = tmp_path / "outputs/a"
    first = train(tmp_path, *command).ended(1)
    assert [line[:14] for line in first.err.splitlines()] == ["error: rank 0 "]
    assert texts(run_dir, "status") == ["failed"]
    assert mlflow_run(run_dir)[1].info.status == "FAILED"
    ended = train(tmp_path, *command).ended()
    assert ended.err == ""
    assert [line.strip() for line in ended.out.splitlines() if "mlflow" in line.lower()] == [
        "MLflow run        mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db"
    ]
    points, stored, share = in_csv(run_dir), in_mlflow(run_dir), "statistics/collective_share"
    assert in_tensorboard(run_dir) == pytest.approx(points)
    assert stored.keys() == points.keys()
    # MLflow keeps what the killed attempt logged. Only a time is another one in the repeated step.
    assert {at: value for at, value in stored.items() if at[1] != share} == {
        at: value for at, value in points.items() if at[1] != share
    }
    assert {"val/acc", "test/acc", "test/loss"} <= {name for _, name in in_csv(run_dir)}
    _, found = mlflow_run(run_dir)
    assert (found.info.status, found.data.params["trainer.max_epochs"]) == ("FINISHED", "2")
    assert found.data.metrics["test/acc"] == ended.json("result")["test"]["test/acc"]
    assert texts(run_dir, "status") == ["failed", "finished"]
    assert len(list(tmp_path.glob("mine/lightning_logs/version_*/metrics.csv"))) == 2  # one an attempt, of rank 0


def test_mlflow_waits_for_a_server_that_is_gone_for_seconds() -> None:
    """Its defaults are minutes, in which the other ranks wait for rank 0."""
    mlflow_logger.prepare()
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    assert (MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), MLFLOW_HTTP_REQUEST_TIMEOUT.get()) == (2, 10)
