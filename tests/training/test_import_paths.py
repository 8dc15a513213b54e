"""The user's files can be imported, come after all others, and those of a run directory cannot."""

import sys
from pathlib import Path

import pytest

from syncbn.training import import_paths


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(import_paths, "_added", [])
    monkeypatch.chdir(tmp_path)
    return list(sys.path)


@pytest.mark.parametrize("option", [["--config-dir", "mine/conf"], ["--config-dir=mine/conf"], ["-cd", "mine/conf"]])
def test_directories_are_appended(tmp_path: Path, path: list[str], option: list[str]) -> None:
    (tmp_path / "mine/conf").mkdir(parents=True)
    import_paths.add(["model=net", *option, "seed=1"])
    added = [tmp_path, tmp_path / "mine", tmp_path / "mine/conf"]
    assert sys.path == [*path, *map(str, added)]
    import_paths.add(option)
    assert len(sys.path) == len(path) + 3


def test_the_directory_that_python_puts_first_is_moved_to_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/lib/syncbn/__main__.py"])
    sys.path.insert(0, str(tmp_path))
    import_paths.begin()
    assert sys.path == path
    import_paths.add([])
    assert sys.path == [*path, str(tmp_path)]


def test_a_missing_directory_is_left_to_hydra(tmp_path: Path, path: list[str]) -> None:
    import_paths.add(["--config-dir", "none/there", "--config-dir"])
    assert sys.path == [*path, str(tmp_path)]


@pytest.mark.parametrize("files", [["run.json"], ["config.yaml", "checkpoints/best.ckpt"]])
@pytest.mark.parametrize("below", [".", "checkpoints", "deep/er"])
def test_run_directories_stay_out(
    tmp_path: Path, path: list[str], monkeypatch: pytest.MonkeyPatch, files: list[str], below: str
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / below).mkdir(parents=True, exist_ok=True)
    for name in files:
        (run / name).touch()
    (tmp_path / "link").symlink_to(run / below)
    monkeypatch.chdir(run / below)
    import_paths.add([])
    monkeypatch.chdir(tmp_path / "link")
    import_paths.add(["--config-dir", str(tmp_path / "link")])
    assert sys.path == [*path, str(tmp_path)]  # which the link lies in, and which --config-dir names as its parent


def test_modules_that_only_these_directories_have(tmp_path: Path) -> None:
    import_paths.add([])
    assert import_paths.is_added(str(tmp_path / "timm.py"))
    assert not import_paths.is_added(None)
    assert not import_paths.is_added(pytest.__file__)
    sys.path.append(str(tmp_path / ".venv/lib"))  # an environment within the project
    assert not import_paths.is_added(str(tmp_path / ".venv/lib/timm/__init__.py"))
