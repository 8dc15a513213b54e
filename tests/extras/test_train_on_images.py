"""train.py on a folder of images, with everything that draws: killed, resumed, tested by class, and tested again."""

import csv
import json
from pathlib import Path

import pytest
import torch

from tests.training.data.support.pictures import pictures
from tests.training.support.faulty_runs import differences, fault
from tests.training.support.train_command import train

COUNTS = {"ant": 40, "bee hive": 24, "čmelák": 16}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    root = pictures(tmp_path / "images", COUNTS, size=(16, 20))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = ["data=folder", f"data.root={root}", "data.size=16", "data.num_workers=1", "data.batch_size=4"]
    given += ["data.cache=0.01", "data.balance=true", "augment=randaugment", "augment.reprob=0.5", "mix=both"]
    given += ["model.width=4", "module.class_weights=[1,2,3]", "trainer.max_epochs=2", "logger=csv"]
    return [*given, "trainer.devices=2", "resume.every_n_steps=3"]


def test_killed_in_the_middle_of_an_epoch_it_ends_bitwise_as_undisturbed(tmp_path: Path, settings: list[str]) -> None:
    straight = train(tmp_path, *settings, "run.id=straight").ended()
    kill = fault(tmp_path, "kill_everything", epoch=1, batch=4)
    killed = train(tmp_path, *settings, "run.id=resumed", kill)
    assert killed.code != 0
    resumed = train(tmp_path, *settings, "run.id=resumed", kill).ended()
    assert [each for each in differences(straight, resumed) if "/current_score: " not in each] == []

    about = json.loads((straight.directory / "data.json").read_text(encoding="utf-8"))
    assert about["classes"] == {"ant": 32, "bee hive": 20, "čmelák": 12}
    assert about["images"] == {"train": 64, "val": 8, "test": 8}
    with (straight.directory / "classes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["samples"]) for row in rows] == [("ant", "4"), ("bee hive", "2"), ("čmelák", "2")]
    assert "worst classes" in straight.out
    assert "čmelák" in straight.out
    assert "80 images in 3 classes" in straight.out
    assert straight.out.count("all read") == 1
    checkpoint = torch.load(straight.directory / "checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["ImageFolder"]["classes"] == sorted(COUNTS)
    assert checkpoint["ImageFolder"]["mean"] == about["mean"]

    root = tmp_path / "images"
    pictures(root, {"ant": 44}, seed=5)  # another mean: the test takes the one of the checkpoint
    again = ["mode=test", f"ckpt_path={straight.directory}/checkpoints/best.ckpt", *settings[:5], "logger=csv"]
    tested = train(tmp_path, *again, "run.id=tested").ended()
    assert "model.num_classes=" not in tested.out
    found = json.loads((tested.directory / "data.json").read_text(encoding="utf-8"))
    assert found["mean"] == about["mean"]
    more = train(tmp_path, *settings, "run.id=straight", "trainer.max_epochs=3")
    assert more.code == 1
    assert "files were added to or removed from its training images since the checkpoint" in more.err
