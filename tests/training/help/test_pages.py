"""``--help`` shows every setting and no schema, finds the user's own groups, and is fast."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from syncbn.training import help as help_pages
from syncbn.training.config.conf_directory import conf_directory
from syncbn.training.help import pages
from tests.test_import import HEAVY
from tests.training.support.train_command import REPO

GROUPS = sorted(path.name for path in conf_directory().iterdir() if path.is_dir() and path.name != "hydra")


def page(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert help_pages.is_asked([*arguments, "--help"])
    assert help_pages.show([*arguments, "--help"]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_the_overview_has_all_groups_choices_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    text = page(capsys)
    conf = pages.Conf([])
    for group in GROUPS:
        assert all(f"  {group}={choice}" in text for choice in conf.choices(group))
        for each in conf.settings(group, str(conf.chosen.get(group))):
            assert each.value is None or f" {each.name}={each.value} " in text.replace("\n", " \n")
    assert "norm=sync   how batch norm statistics are computed\n" in text
    assert "  resume.keep=2 " in text
    assert "  seed=0 " in text
    assert "schema" not in text
    assert "._target_=" not in text


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_a_page_with_the_settings_of_all_choices(
    capsys: pytest.CaptureFixture[str], group: str
) -> None:
    text, conf = page(capsys, group), pages.Conf([])
    for choice in conf.choices(group):
        assert f"  {group}={choice} " in text.replace("\n", " \n")
        for each in conf.settings(group, choice) if group != "study" else ():
            assert each.value is None or f"{each.name}={each.value}" in text
    assert "schema" not in text


def test_the_settings_of_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    ghost = (
        "      norm.batch_size=16  number of samples that share statistics; must divide data.batch_size and be smaller"
    )
    assert ghost in page(capsys, "norm=ghost").splitlines()
    assert "norm.group=world" not in page(capsys, "norm=ghost")


def test_files_that_others_are_built_on_are_included(capsys: pytest.CaptureFixture[str]) -> None:
    text = page(capsys, "callbacks=gradients")
    assert "callbacks.checkpoint.monitor=val/acc" in text
    assert "callbacks.gradients.every_n_steps=null" in text
    assert "study.budget=default" in page(capsys, "study=shards")
    assert "      model=mlp" in page(capsys, "experiment=small_batch").splitlines()


def test_settings_by_a_part_of_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split(maxsplit=1) for line in page(capsys, "weight_decay").splitlines()]
    adamw, sgd = (next(what for name, what in lines if name.endswith(value)) for value in ("=1.0e-2", "=5.0e-4"))
    assert adamw.startswith("(optimizer=adamw) ")
    assert not sgd.startswith("(")  # the choice that is taken


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ("trainr", "no group or setting has this name; did you mean trainer"),
        ("norm=synch", "norm has no choice synch; did you mean sync?"),
        ("zzz", "no group or setting has this name; python train.py --help lists them"),
    ],
)
def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str], asked: str, line: str) -> None:
    text = page(capsys, asked, code=1)
    assert text.startswith(f"error: --help {asked}: {line}")
    assert text.count("\n") == 1


def test_the_users_groups_and_choices_are_included(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/net.yaml").write_text(
        "# My net. Good.\n_target_: x.Net\nhidden: 3   # features\n", encoding="utf-8"
    )
    (tmp_path / "model/mlp.yaml").write_text("# Another.\ndepth: 1\n", encoding="utf-8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/one.yaml").write_text("# One.\nx: 1   # an x\n", encoding="utf-8")
    text = page(capsys, "--config-dir", str(tmp_path), "model=net", "mine=one")
    assert "      model.hidden=3  features" in page(capsys, "--config-dir", str(tmp_path), "model=net").splitlines()
    assert "model=mlp  Another" in page(capsys, f"--config-dir={tmp_path}", "model")
    assert "      mine.x=1  an x" in text.splitlines()


def test_a_bad_directory_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, wrong in (("none", "there is no such directory"), ("file", "not a directory")):
        text = page(capsys, "--config-dir", f"{tmp_path}/{name}", code=1)
        assert text == f"error: --config-dir={tmp_path}/{name}: {wrong}\n"


def test_it_is_fast_and_imports_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['train.py', '--help']\nfrom syncbn.train import main\ntry:\n    main()\n"
    code += "finally:\n    print(*sys.modules)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False, cwd=REPO)
    assert time.monotonic() - start < 10  # 0.2 seconds on an idle machine
    assert done.returncode == 0
    assert not {*HEAVY, "torch"} & set(done.stdout.splitlines()[-1].split())
