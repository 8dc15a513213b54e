"""What Hydra refuses is one line that names the setting as it was typed, and the nearest one that exists."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig

from syncbn.training.composition import full_error
from syncbn.training.composition.composition_errors import check_options, explained
from syncbn.training.composition.run_hydra import COMPOSITION, run_hydra
from syncbn.training.errors import SettingError
from syncbn.training.launch import main  # noqa: F401  # registers what conf/ names
from tests.support.refuses import ANY, refuses
from tests.training.support.train_command import REPO, environment, train

CONF = str(REPO / "conf")

# A command line, and what its error has: the setting, its value, words of the hint.
BAD: dict[str, tuple[Any, ...]] = {
    "optimzer.lr=0.1": ("optimzer.lr", "0.1", "there is no such setting; the nearest is optimizer.lr"),
    "trainer.max_epoch=3": ("trainer.max_epoch", "3", "the nearest is trainer.max_epochs"),
    "run.idd=3": ("run.idd", "3", "the nearest is run.id"),
    "lr=0.1": ("lr", "0.1", "the nearest is optimizer.lr"),
    "batch_size=8": ("batch_size", "8", "the nearest are data.batch_size, norm.batch_size"),
    "epochs=8": ("epochs", "8", "scheduler.epochs"),
    "optimizer.learning_rate=1": ("optimizer.learning_rate", "1", "the nearest is optimizer.lr"),
    "optimizer.maximize=true": ("optimizer.maximize", "true", "of torch.optim.SGD", "add it: +optimizer.maximize=true"),
    "hydra.run.dirr=x": ("hydra.run.dirr", "x", "the nearest is hydra.run.dir"),
    "hydra/launchr=basic": ("hydra/launchr", "basic", "the nearest is hydra/launcher"),
    "optimzer=adamw": ("optimzer", "adamw", "the nearest is optimizer"),
    "norm=synch": ("norm", "synch", "there is no such choice; the nearest is sync (there are ghost, "),
    "optimizer=admw": ("optimizer", "admw", "the nearest is adamw (there are adam, adamw, "),
    "model=resnt": ("model", "resnt", "the nearest is resnet"),
    "+experiment=nope": ("experiment", "nope", "there are moco, search, segmentation, simclr, small_batch"),
    "+study=learning_rat": ("study", "learning_rat", "the nearest is learning_rate"),
    "+study=nope": ("study", "nope", "there are base, cifar10, claims, "),
    "hydra/launcher=nope": ("hydra/launcher", "nope", "there are basic, syncbn"),
    "logger=true": ("logger", "true", "logger is a group of settings: choose one of its files by name"),
    "norm=null": ("norm", "null", "norm is a group of settings: choose one of its files by name"),
    "data=null": ("data", "null", "choose one of its files by name"),
    "model=null": ("model", "null", "choose one of its files by name"),
    "norm=3": ("norm", "3", "choose one of its files by name"),
    "seed=abc": ("seed", "abc", "use a whole number"),
    "seed=1.5": ("seed", "1.5", "use a whole number"),
    "target=high": ("target", "high", "use a number"),
    "test=maybe": ("test", "maybe", "use true or false"),
    "run=3": ("run", "3", "this is a group of settings, not a value; use run.NAME=..."),
    "data.batch_size=[1": ("data.batch_size", "[1", "close brackets and quotes"),
    "seed": ("seed", None, "there is no = in it; write seed=VALUE"),
    "+seed=1": ("+seed", "1", "this setting exists already; leave out the +: seed=1"),
    "+data=imagenet": ("+data", "imagenet", "leave out the +: data=imagenet"),
    "~sed": ("~sed", None, "the nearest is seed"),
    "norm=sync,local": ("norm", "sync,local", "which needs -m", "a list has brackets: norm=[sync,local]"),
    "--config-dir nowhere": ("--config-dir", "nowhere", "there is no such directory"),
    "--config-name nope": ("--config-name", "nope", "there is no nope.yaml"),
    "-m norm=synch,sync": ("norm", "synch", "the nearest is sync"),
    "-m optimzer.lr=1,2": ("optimzer.lr", "1,2", "the nearest is optimizer.lr"),
}


@pytest.fixture(autouse=True)
def _without_handlers_of_hydra() -> Iterator[None]:
    """Hydra gives the root logger a handler that writes to the standard output of this test, which is closed later."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = [each for each in root.handlers if each in before or type(each) is not logging.StreamHandler]
    root.setLevel(level)


def refusal(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> Exception:
    """What Hydra raises for a command line of train.py."""

    def train(cfg: DictConfig) -> None:
        pytest.fail("it was accepted")

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setenv(full_error.NAME, "1")
    with pytest.raises(COMPOSITION) as caught:
        hydra.main(version_base="1.3", config_path=CONF, config_name="config")(train)()
    return caught.value


@pytest.mark.parametrize("line", BAD)
def test_the_setting_and_the_nearest_are_named(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, value, *words = BAD[line]
    monkeypatch.chdir(tmp_path)
    error = refusal(*line.split(), monkeypatch=monkeypatch)
    with refuses(setting, value, *words):
        raise explained(error, line.split(), CONF, "config")


def test_choices_of_the_users_own_directory_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/vision.yaml").write_text("_target_: mine.Net\nmy_width: 3\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for line, setting, hint in (
        ("model=vison", "model", "the nearest is vision (there are deeplab, mlp, resnet, resnet50, "),
        ("model=vision model.my_widht=4", "model.my_widht", "the nearest is model.my_width"),
    ):
        arguments = ["--config-dir", "mine", *line.split()]
        error = refusal(*arguments, monkeypatch=monkeypatch)
        with refuses(setting, ANY, hint):
            raise explained(error, arguments, CONF, "config")


def test_a_file_that_a_built_in_choice_would_hide_is_named(tmp_path: Path) -> None:
    for name in ("module/mine", "module/classifier"):
        (tmp_path / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text("_target_: mine.Module\n", encoding="utf-8")
    with refuses("--config-dir", str(tmp_path), "module/classifier.yaml has the name of a built-in choice", "rename"):
        check_options(["--config-dir", str(tmp_path), "norm=sync"])
    shutil.copy(
        Path(CONF) / "module/classifier.yaml", tmp_path / "module/classifier.yaml"
    )  # the same: nothing is hidden
    (tmp_path / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    check_options(["--config-dir", str(tmp_path), "norm=sync"])


def test_a_broken_file_is_named_with_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/a.yaml").write_text("a: 1\nb: [1\nc: 2\n", encoding="utf-8")
    (tmp_path / "model/b.yaml").write_text("defaults:\n  - resnt\n", encoding="utf-8")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/c.yaml").write_text("# @package _global_\noptimzer:\n  lr: 1\n", encoding="utf-8")
    (tmp_path / "experiment/d.yaml").write_text("# @package _global_\nseed: abc\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, words in (
        ("model=a", "a.yaml, line 3: this is no YAML: expected ',' or ']', but got ':'"),
        ("model=b", "model=resnt: there is no such choice (in model/b.yaml); the nearest is resnet"),
        ("experiment=c", "optimzer: in experiment/c.yaml: there is no such setting; the nearest is optimizer"),
        ("experiment=d", "seed: in experiment/d.yaml: Value 'abc' of type 'str' could not be converted to Integer"),
    ):
        arguments = ["--config-dir", ".", name]
        error = explained(refusal(*arguments, monkeypatch=monkeypatch), arguments, CONF, "config")
        assert words in str(error)
        assert "\n" not in str(error)


def test_a_message_that_is_not_known_is_one_line() -> None:
    assert str(explained(HydraException("a\n  b\tc"), [], CONF, "config")) == "settings: a b c"


def test_an_option_that_hydra_lacks_is_named() -> None:
    with refuses("--norm=sync", None, "a setting has no dashes: norm=sync"):
        check_options(["seed=1", "--norm=sync"])
    check_options(["-m", "--config-dir", "a", "seed=1"])
    with refuses("seed", "0,1", "put all settings together, before or after the options"):
        check_options(["norm=local", "-m", "seed=0,1"])
    for arguments, setting, words in (
        (["seed=1", "--config-dir"], "--config-dir", "expected one argument"),
        (["--info", "nope"], "--info", "invalid choice: 'nope'"),
        (["--cfg", "nope"], "--cfg", "invalid choice: 'nope'"),
    ):
        with refuses(setting, None, words):
            check_options(arguments)


@pytest.mark.parametrize("given", [None, "0", "1"])
def test_the_job_has_the_users_full_error(given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def job(cfg: DictConfig) -> None:
        seen.append(os.environ.get(full_error.NAME))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv(full_error.NAME, given) if given else monkeypatch.delenv(full_error.NAME, raising=False)
    run_hydra(job, CONF)
    assert seen == [given]
    assert os.environ.get(full_error.NAME) == given
    assert full_error.wanted() == (given == "1")


def test_an_exception_of_the_job_is_reported_as_hydra_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(cfg: DictConfig) -> None:
        raise ValueError("of the job")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.delenv(full_error.NAME, raising=False)
    with pytest.raises(SystemExit):
        run_hydra(job, CONF)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ValueError: of the job" in err
    monkeypatch.setenv(full_error.NAME, "1")
    with pytest.raises(ValueError, match="of the job"):
        run_hydra(job, CONF)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("+optimzer.lr=0.1", "no part of the program reads this setting; the nearest is optimizer.lr"),
        ("model.num_classes=5", "these data have 10 classes; leave it out, or use 10"),
    ],
)
def test_one_line_before_torch_is_imported(tmp_path: Path, wrong: str, hint: str) -> None:
    program = f"""
import runpy, sys
sys.argv = ["train.py", {wrong!r}, "hydra.run.dir=new/dir"]
try:
    runpy.run_path({str(REPO / "train.py")!r}, run_name="__main__")
finally:
    print([name for name in ("torch", "lightning", "pandas") if name in sys.modules])
"""
    begin = time.process_time()
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, encoding="utf-8"
    )
    assert run.returncode == 1
    assert run.stderr == f"error: {wrong.removeprefix('+')}: {hint}\n"
    assert run.stdout == "[]\n"
    assert time.process_time() - begin < 5
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_line_is_one_line_and_a_traceback_if_asked_for(tmp_path: Path) -> None:
    run = train(tmp_path, "norm.grop=2").ended(1)
    assert run.err == "error: norm.grop=2: there is no such setting; the nearest is norm.group\n"
    run = train(tmp_path, "norm.grop=2", full_error=True).ended(1)
    assert "Traceback" in run.err
    assert "ConfigCompositionException" in run.err


def test_a_sweep_runs_the_jobs_whose_settings_are_read(tmp_path: Path) -> None:
    run = train(tmp_path, "-m", "+optimizer.learning_rate=1,2", "logger=csv").ended(1)
    lines = [line for line in run.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 3
    assert lines[0].startswith("error: optimizer.learning_rate=1: torch.optim.SGD has no argument learning_rate; the ")
    assert lines[2].startswith("error: 2 of 2 jobs failed (job 0, 1);")
    assert "Traceback" not in run.err


def test_setting_errors_are_what_the_program_expects() -> None:
    assert issubclass(SettingError, ValueError)  # so run_hydra has to catch it before COMPOSITION
