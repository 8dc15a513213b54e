"""docs/guide/inference.md: its code runs, and its options exist."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from syncbn.cli import app
from syncbn.inference.export import export
from syncbn.training.models.networks import ResNet
from tests.inference.support.crafted_runs import crafted, seen_something
from tests.inference.support.pictures import a_seven
from tests.training.support.train_command import REPO

PAGE = (REPO / "docs/guide/inference.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"_target_": "syncbn.training.ResNet", "in_channels": 1, "num_classes": 10, "width": 16}
    run = crafted(tmp_path / "outputs/mine", seen_something(ResNet(), 1, 8, 8), model)
    export(run, to="torch")
    a_seven(tmp_path / "digit.png")
    names = {"Net": ResNet}
    blocks = [each for each in BLOCKS if "onnxruntime" not in each]
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out.splitlines()
    assert said[0] in "0123456789"
    assert f"# {said[1]}" in BLOCKS[-1]


def test_its_options_exist() -> None:
    command = get_command(app).commands["export"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![-|])--[a-z][a-z-]+", PAGE)) - {"--config-dir"}
    assert len(named) == 7
    assert named <= known
