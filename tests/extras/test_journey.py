"""A newcomer's journey, each command as it is typed: own images, train, kill -9, resume, and all that follows.

A project of ``syncbn init`` is trained on a folder of images. What is trained is shared by all steps, which stand in
the order in which a newcomer takes them.
"""

import csv
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import syncbn
from tests.training.data.support.pictures import pictures
from tests.training.support import train_command
from tests.training.support.train_command import Run

CLASSES = ("cat", "dog", "sea lion")
EPOCHS = 3
TRAIN = ("--config-dir", "conf", "model=network", "data=folder", "data.root=../images", "model.width=4")
TRAIN += ("model.in_channels=3", "model.num_classes=3")
TRAIN += ("data.batch_size=4", "data.num_workers=0", "resume.every_n_steps=5", "run.id=first", "logger=csv")
TRAIN += (f"trainer.max_epochs={EPOCHS}",)
RUN = "outputs/first"

Type = Callable[..., Run]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``images/train`` and ``images/test``, a folder per class."""
    where = tmp_path_factory.mktemp("journey")
    for part, count in (("train", 40), ("test", 12)):
        pictures(where / "images" / part, dict.fromkeys(CLASSES, count), size=(16, 16), seed=len(part))
    return where


@pytest.fixture(scope="module")
def syncbn_(home: Path) -> Type:
    """Types ``syncbn ...`` in the project, or in the directory above it as long as there is none."""
    env = train_command.environment() | {"XDG_CACHE_HOME": str(home / "cache")}
    env["PYTHONPATH"] = str(train_command.REPO)

    def typed(*words: str, code: int = 0, **options: Any) -> Run:
        where = home / "project" if (home / "project").is_dir() else home
        command = sys.executable, "-m", "syncbn", *words
        done = train_command.run(where, *command, env=env, **({"timeout": 120} | options))
        return done if code is None else done.ended(code)

    return typed


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_journey(home: Path, syncbn_: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    project, run = home / "project", home / "project" / RUN

    # A project of one's own.
    assert "cd project && syncbn train --config-dir conf" in syncbn_("init", "project").out
    assert (project / "conf/model/network.yaml").is_file()

    # Training, killed without warning in the second epoch.
    def kill(leader: int) -> None:
        while not list(run.glob("checkpoints/step-0000002*.ckpt")):
            time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)

    killed = syncbn_("train", *TRAIN, code=None, meanwhile=kill)
    assert killed.code == -signal.SIGKILL
    assert "data: 156 images in 3 classes, all read" in killed.out
    assert not (run / "result.json").exists()
    listed = syncbn_("runs").out.splitlines()
    assert listed[1].split()[:2] == [RUN, "killed"]

    # The same command again resumes it.
    resumed = syncbn_("train", *TRAIN)
    assert "resumes" in resumed.out
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert (result["epochs"], result["test"]["test/count"]) == (EPOCHS, 36)
    assert f"{100 * result['test']['test/acc']:.2f} % of 36 samples" in resumed.out
    assert result["test"]["test/acc"] > 0.5  # it has learned something: chance is a third

    # Another run to compare with, and the list of both.
    syncbn_("train", *(word.replace("first", "local") for word in TRAIN), "norm=local", "trainer.max_epochs=1")
    head, *rows = (line.split() for line in syncbn_("runs", "--sort=test/acc").out.splitlines()[:3])
    assert head[:2] == ["run", "status"]
    assert {"norm", "trainer.max_epochs", "test/acc", "val/acc"} <= {*head}
    assert {row[0]: row[1] for row in rows} == {RUN: "finished", "outputs/local": "finished"}
    chosen = syncbn_("runs", "--filter=norm=local", "--columns=norm", "--csv")
    assert chosen.out == "run,norm.name\noutputs/local,local\n"

    # Its checkpoint tested again. The metrics are the same to the last digit.
    shown = syncbn_("evaluate", RUN, "--config-dir=conf", "--trust", "data.batch_size=4", "--out=table.csv")
    (row,) = table(project / "table.csv")
    assert {name: float(row[name]) for name in result["test"]} == result["test"]
    assert f"{RUN}" in shown.out

    # Exported, with plain batch norm, and compared with the network; not without trust, as the network is one's own.
    refused = syncbn_("export", RUN, "--to=onnx", code=1)
    assert "model._target_=project.network.Network: " in refused.err
    exported = syncbn_("export", RUN, "--to=onnx", "--trust")
    assert "network.onnx" in exported.out

    # Every image of a folder.
    shutil.copy(home / "images/test/dog/0.png", home / "images/test/dog/broken.png")
    os.truncate(home / "images/test/dog/broken.png", 100)
    predicted = syncbn_("predict", RUN, "../images/test", "--out=p.csv", "--trust", "--batch-size=8", code=1)
    rows = table(project / "p.csv")
    assert len(rows) == 36
    assert [line.split(" (")[0] for line in predicted.err.splitlines()] == [
        "cannot be read: ../images/test/dog/broken.png",
        "error: 1 file was left out: see above",
    ]
    right = [row["class"] == Path(row["file"]).parent.name for row in rows]
    assert sum(right) / 36 == pytest.approx(result["test"]["test/acc"], abs=1e-6)

    # In a notebook, in three lines.
    monkeypatch.chdir(project)
    network = syncbn.load(RUN, trust=True)
    first = project / rows[0]["file"]
    scores = network(network.preprocess(first).unsqueeze(0)).softmax(1)[0]
    assert network.classes == list(CLASSES)
    assert network.classes[scores.argmax()] == rows[0]["class"]
    assert float(scores.detach().max()) == pytest.approx(float(rows[0]["probability"]), abs=1e-5)

    # And outside of torch.
    import onnxruntime

    session = onnxruntime.InferenceSession(run / "network.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: network.preprocess(first).unsqueeze(0).numpy()})
    assert found.argmax() == scores.argmax()
