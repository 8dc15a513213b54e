"""The user's files can be imported, come after all others, and those of a run directory cannot."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path

import pytest

from syncbn.training import import_paths
from tests.training.support.train_command import REPO


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(import_paths, "_added", [])
    monkeypatch.setattr(import_paths, "_names", set())
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield import_paths._added
    for name in set(sys.modules) - before:
        del sys.modules[name]
    invalidate_caches()


@pytest.mark.parametrize("option", [["--config-dir", "mine/conf"], ["--config-dir=mine/conf"], ["-cd", "mine/conf"]])
def test_directories_come_last(tmp_path: Path, added: list[str], option: list[str]) -> None:
    path = list(sys.path)
    (tmp_path / "mine/conf").mkdir(parents=True)
    for _ in range(2):
        import_paths.add(["model=net", *option, "seed=1"])
        assert added == [str(tmp_path), str(tmp_path / "mine"), str(tmp_path / "mine/conf")]
        assert sys.path == path
        assert sys.meta_path[-1:] == [import_paths._FINDER]


def test_a_missing_directory_is_left_to_hydra(tmp_path: Path, added: list[str]) -> None:
    import_paths.add(["--config-dir", "none/there", "--config-dir"])
    assert added == [str(tmp_path)]


@pytest.mark.parametrize("files", [["run.json"], ["config.yaml", "checkpoints/best.ckpt"]])
@pytest.mark.parametrize("below", [".", "checkpoints", "deep/er"])
def test_run_directories_stay_out(
    tmp_path: Path, added: list[str], monkeypatch: pytest.MonkeyPatch, files: list[str], below: str
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
    assert added == [str(tmp_path)]  # which the link lies in, and which --config-dir names as its parent


def test_modules_that_only_these_directories_have(tmp_path: Path) -> None:
    import_paths.add([])
    assert import_paths.is_added(str(tmp_path / "timm.py"))
    assert not import_paths.is_added(None)
    assert not import_paths.is_added(pytest.__file__)
    sys.path.append(str(tmp_path / ".venv/lib"))  # an environment within the project
    assert not import_paths.is_added(str(tmp_path / ".venv/lib/timm/__init__.py"))


def test_only_what_the_settings_name_and_what_own_files_import_is_found(tmp_path: Path) -> None:
    for name, text in {
        "own_net": "import own_helper\ndef late():\n    from importlib import import_module\n"
        "    return import_module('own_late')",
        "own_helper": "from own_package.part import X",
        "own_package/__init__": "",
        "own_package/part": "X = 1",
        "own_late": "",
        "own_other": "raise RuntimeError",
        "hydra_plugins/evil": "raise RuntimeError",
    }.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text + "\n", encoding="utf-8")
    import_paths.add(["model._target_=own_net.Net"])
    for name in ("own_helper", "own_other", "own_package", "own_late"):
        assert find_spec(name) is None
    module = import_module("own_net")
    assert module.late().__name__ == "own_late"
    assert find_spec("own_other") is None
    import_paths.allow({"model": [{"_target_": "hydra.utils.get_method", "path": "own_other.f"}], "more": "json.x"})
    assert find_spec("own_other") is not None
    import_paths.allow({"_target_": "hydra_plugins.evil.X"})
    assert import_paths.find("hydra_plugins") is None


def test_hydras_own_settings_of_the_users_are_read_but_no_config_of_a_run(tmp_path: Path) -> None:
    for name in ("hydra/callbacks/mine", "experiment/first", "run/config"):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(f'a:\n  "_target_": own_{path.parent.name}.A\n', encoding="utf-8")
    (tmp_path / "run/run.json").touch()
    import_paths.add(["--config-dir", "."])
    assert import_paths._names == {"own_callbacks", "own_experiment"}


def test_another_process_finds_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: list[str]) -> None:
    import_paths.add([])
    for name, value in import_paths.exported().items():
        monkeypatch.setenv(name, value)
    added.clear()
    import_paths.receive()
    assert added == [str(tmp_path)]


def test_files_with_the_names_of_python_and_of_optional_packages_are_not_executed(tmp_path: Path) -> None:
    names = ("string", "logging", "signal", "json", "dill", "org", "nt", "pynvml", "triton", "psutil", "tree", "attr")
    for name in (*names, "cuda/__init__", "hydra_plugins/evil", "hydra_plugins/hydra_evil/__init__"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = f"from pathlib import Path\nPath({str(tmp_path)!r}, 'executed').open('a').write({name!r})\n"
        path.write_text(text, encoding="utf-8")
    arguments = ("train", "logger=csv", "trainer.devices=1", "trainer.max_epochs=1", "model=mlp")
    done = subprocess.run(
        [sys.executable, "-m", "syncbn", *arguments],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert "test accuracy" in done.stdout, done.stderr
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text(encoding="utf-8")
