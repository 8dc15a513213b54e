"""``syncbn evaluate``: the numbers of mode=test, for several checkpoints and data sets at once."""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from syncbn import __version__
from syncbn.inference.evaluation import data_sets, table
from syncbn.inference.evaluation.command import sorted_out
from syncbn.inference.evaluation.table import Cell
from tests.support.refuses import refuses
from tests.training.support import train_command
from tests.training.support.train_command import Run

SETTINGS = ("trainer.max_epochs=1", "logger=csv", "trainer.devices=1")
SHIFTED = "data=digits,data.corruption=shift"


def syncbn(where: Path, *arguments: str, **options: Any) -> Run:
    command = sys.executable, "-m", "syncbn", *arguments
    return train_command.run(where, *command, env=train_command.environment(), **({"timeout": 120} | options))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the run ``outputs/a``."""
    where = tmp_path_factory.mktemp("evaluate")
    train_command.train(where, *SETTINGS, "model=mlp", "run.id=a").ended()
    return where


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_numbers_are_those_of_the_test(place: Path) -> None:
    (place / "outputs/empty").mkdir()
    (place / "outputs/empty/run.json").write_text('{"status": "failed"}', encoding="utf-8")
    arguments = ["outputs/a", "outputs/empty", "adapt=stream", "trainer.devices=2"]
    arguments += ["--data=digits", f"--data={SHIFTED}", "--directory=tests", "--out=all.json", "--metric=test/loss"]
    done = syncbn(place, "evaluate", *arguments).ended(1)
    found = {(row["checkpoint"], row["data"]): row for row in rows(place / "tests/evaluation.csv")}
    assert len(found) == 4
    assert [row["error"] != "" for row in found.values()] == [False] * 2 + [True] * 2
    options = "mode=test", "ckpt_path=outputs/a/checkpoints/best.ckpt", "adapt=stream", "trainer.devices=2"
    tested = train_command.train(place, *options, "data.corruption=shift", "logger=csv", "run.id=t").ended()
    expected = tested.json("result")["test"]
    shifted = found["outputs/a", "digits,corruption=shift"]
    assert {name: float(shifted[name]) for name in expected} == expected
    plain = found["outputs/a", "digits"]
    assert float(plain["test/acc"]) > float(shifted["test/acc"])
    again = json.loads((place / "all.json").read_text(encoding="utf-8"))
    assert again[1]["metrics"] == expected
    assert again[2]["metrics"] == {}
    # SYNCBN_PLOTS=false of the tests is a bool here too: the text "false" would draw the pictures.
    assert "\nplots: false\n" in (place / "tests/0/config.yaml").read_text(encoding="utf-8")
    # What is printed: a line per test, the table with the metric asked for, one line for the run without a checkpoint.
    assert f"2 of 4: outputs/a on digits,corruption=shift: test/acc {expected['test/acc']:.4f}" in done.out
    line = next(each for each in done.out.splitlines() if each.split()[:1] == ["outputs/a"])
    assert line.split()[1:] == [f"{float(plain['test/loss']):.4f}", f"{expected['test/loss']:.4f}"]
    assert done.out.splitlines()[-1] == "tests/evaluation.csv"
    first, last = done.err.splitlines()
    assert first.startswith("outputs/empty on digits, digits,corruption=shift: this run has no checkpoint")
    assert last == "error: 2 of 4 tests failed"
    assert done.left == []


def test_its_own_data_and_mistakes_in_settings(place: Path) -> None:
    done = syncbn(place, "evaluate", "outputs/a", "trainer.devices=1", "--out=own.csv", "--metric=test/ac").ended(1)
    expected = train_command.Run(0, "", "", place / "outputs/a", []).json("result")["test"]
    (row,) = rows(place / "own.csv")
    assert row["data"] == data_sets.OWN
    assert {name: float(row[name]) for name in expected} == expected
    assert done.err == "error: --metric=test/ac: no test has it; the nearest is test/acc\n"
    before = sorted((place / "outputs").iterdir())
    wrong = syncbn(place, "evaluate", "outputs/a", "trainer.device=1").ended(1)
    assert wrong.err == "error: trainer.device=1: there is no such setting; the nearest is trainer.devices\n"
    (place / "sweep").mkdir()
    for number in "01":
        (place / "sweep" / number).symlink_to(place / "outputs/a")
    data = f"--data=data=folder,data.root={place}/nothing"
    wrong = syncbn(place, "evaluate", "outputs/a", "sweep", "outputs/gone", data).ended(1)
    first, second, third, last = wrong.err.splitlines()
    assert f" data.root={place}/nothing: there is no such directory" in first
    assert "this directory holds 2 runs; use one of them, the newest are sweep/" in second
    assert "RUN=outputs/gone: there is no such run directory or checkpoint" in third
    assert last == "error: 3 of 3 tests failed"
    made = [each for each in (place / "outputs").iterdir() if each not in before]
    assert [{path.name for path in each.iterdir()} for each in made] == [{".lock", "evaluation.csv"}]


def test_data_of_the_users_own_need_trust(tmp_path: Path) -> None:
    settings = {"data": {"_target_": "mine.Data", "root": "x"}}
    about = {"overrides": ["data=mine", "+data.more=1", "norm=sync"]}
    with refuses("data._target_", "mine.Data", "--data", "--trust"):
        data_sets.of_run(settings, about, trust=False)
    assert data_sets.of_run(settings, about, trust=True) == ["data=mine", "+data.more=1"]
    folder = {"_target_": "syncbn.training.ImageFolder", "cache_dir": "/etc", "val_fraction": 0.2}
    root = str(tmp_path / "it's \\ a, 'b\\'")
    taken = data_sets.of_run({"data": folder | {"root": root}}, {}, trust=False)
    assert [each.partition("=")[0] for each in taken] == ["data", "data.root", "data.val_fraction"]
    assert OverridesParser.create().parse_override(taken[1]).value() == root
    cifar = {"_target_": "syncbn.training.CIFAR", "name": "cifar10", "train_images": 20, "test_images": 10}
    assert data_sets.of_run({"data": cifar}, {}, trust=False) == ["data=cifar10", "data.test_images=10"]
    with refuses("data.root", "${oc.env:HOME}", "no plain value"):
        data_sets.of_run({"data": folder | {"root": "${oc.env:HOME}"}}, {}, trust=False)


def test_a_checkpoint_of_another_version_is_named_with_both_versions(place: Path) -> None:
    old = place / "old"
    shutil.copytree(place / "outputs/a", old)
    about = json.loads((old / "run.json").read_text(encoding="utf-8"))
    (old / "run.json").write_text(json.dumps(about | {"versions": {"syncbn": "0.0.3"}}), encoding="utf-8")
    weights = torch.load(old / "checkpoints/best.ckpt", weights_only=True)
    weights["state_dict"]["network.renamed"] = weights["state_dict"].pop(next(iter(weights["state_dict"])))
    torch.save(weights, old / "checkpoints/best.ckpt")
    done = syncbn(place, "evaluate", "old", "trainer.devices=1").ended(1)
    line, _ = done.err.splitlines()
    assert "it is not of this model" in line
    assert line.endswith(f"; it was trained with syncbn 0.0.3, installed is syncbn {__version__}")


@pytest.mark.parametrize(
    ("text", "overrides", "label"),
    [
        ("digits", ["data=digits"], "digits"),
        ("data=folder,data.root=a/b", ["data=folder", "data.root=a/b"], "folder,root=a/b"),
        ("folder, data.size=[96,128]", ["data=folder", "data.size=[96,128]"], "folder,size=[96,128]"),
        ("folder,data.root='a,b=c'", ["data=folder", "data.root='a,b=c'"], "folder,root='a,b=c'"),
        ("folder,data.root=a,b", ["data=folder", "data.root=a,b"], "folder,root=a,b"),
    ],
)
def test_how_a_data_set_is_typed(text: str, overrides: list[str], label: str) -> None:
    assert data_sets.parse(text) == (label, overrides)


def test_arguments_that_belong_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert sorted_out(["lr=0.1", "a", "adapt=stream", "data.batch_size=8", "a"]) == (
        ["lr=0.1", "a"],
        ["adapt=stream", "data.batch_size=8"],
    )
    for words, name in ((["a=1"], "RUN"), (["a", "data.root=x"], "data.root"), (["a", "ckpt_path=x"], "ckpt_path")):
        with refuses(name):
            sorted_out(words)
    with refuses("--data", "norm=sync", "no setting of data"):
        data_sets.parse("norm=sync")
    with refuses("--data", "data.root=x", "first"):
        data_sets.parse("data.root=x")


def test_the_table_has_a_row_for_each_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [Cell("a", "x", {"test/acc": 0.5, "test/loss": 2e4}), Cell("b\x1b", "x", {}, "broken")]
    assert table.names(cells, []) == ["test/acc", "test/loss"]
    table.show(cells, table.names(cells, []))
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "0.5000", "2e+04"] in printed
    assert ["b\\x1b", "failed"] in printed
