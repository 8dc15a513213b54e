"""``syncbn init`` writes a project that trains at once, and whose test passes."""

import subprocess
import sys
from pathlib import Path

import pytest

from syncbn.project import create
from tests.support.refuses import refuses
from tests.test_syncbn_train import syncbn_train

FILES = {
    *("README.md", ".gitignore", "pyproject.toml", "tests/test_network.py", "conf/model/network.yaml"),
    *("conf/data/images.yaml", "conf/experiment/first.yaml"),
    *(f"digits_2/{name}.py" for name in ("__init__", "network", "images")),
}


def test_a_project_trains_and_its_test_passes(tmp_path: Path) -> None:
    project = tmp_path / "digits-2"
    lines = create.create(project)
    assert {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()} == FILES
    assert not any(create.NAME in path.read_text(encoding="utf-8") for path in project.rglob("*") if path.is_file())
    assert lines[-1].endswith("syncbn train --config-dir conf experiment=first")
    command = lines[-1].partition("syncbn train ")[2].split()
    ran = syncbn_train(project, *command, "debug=fast", "trainer.devices=2", "logger=csv").ended()
    assert "2 processes" in ran.out
    forgotten = syncbn_train(project, "experiment=first").ended(1)
    hint = "there is no such choice; the directory conf here has it: add --config-dir conf"
    assert forgotten.err == f"error: experiment=first: {hint}\n"
    assert ran.json("result")["test"]["test/acc"] >= 0
    tested = syncbn_train(project, "-q", command=[sys.executable, "-m", "pytest"]).ended()
    assert "2 passed" in tested.out


def test_the_readme_names_files_and_settings_that_exist(tmp_path: Path) -> None:
    create.create(tmp_path / "mine")
    text = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    named = [
        word.strip("`,") for line in text.splitlines() if line.startswith("| `") for word in line.split("|")[1].split()
    ]
    assert named
    assert all((tmp_path / "mine" / name).is_file() for name in named)


def test_a_directory_with_files_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refuses("directory", tmp_path, "not empty"):
        create.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refuses("directory", tmp_path / "file/x", "a part of this path is a file"):
        create.create(tmp_path / "file/x")


@pytest.mark.parametrize(
    ("directory", "package"),
    [
        *[("my-Net", "my_net"), ("3d", "project_3d"), ("ü", "project"), ("torch", "torch_project")],
        *[("random", "random_project"), ("class", "class_project"), ("tests", "tests_project"), ("a.b", "a_b")],
    ],
)
def test_the_package_is_named_after_the_directory(directory: str, package: str) -> None:
    assert create.package_name(directory) == package


def test_the_command_writes_it_and_refuses_it_the_second_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "syncbn", "init", "mine"]
    first, second = (
        subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False) for _ in "ab"
    )
    assert (first.returncode, first.stderr) == (0, "")
    assert (second.returncode, second.stderr) == (1, "error: directory=mine: it is not empty; use a new directory\n")
