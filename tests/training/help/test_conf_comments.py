"""Every setting of every file in conf/ is read as YAML reads it, and is explained."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from syncbn.training.config.conf_directory import conf_directory
from syncbn.training.help.conf_comments import Setting, read
from syncbn.training.help.pages import INTERNAL

CONF = conf_directory()
FILES = sorted(path for path in CONF.rglob("*.yaml") if path.parent.name not in ("study", "hydra"))
OBVIOUS = ("name",)  # the name of the choice
EXAMPLE = """# The first sentence, of Author et al. 2016. The second.
#   a command
# over lines.
defaults:
  - model: net   # the network
  - base
  - override /norm: local

a: 1             # one; "x"
text: "a # b"    # a text
# Above it.
list: [1, 2]
section:         # of settings
  inner: null    # in a section
                 # over two lines
bare: x
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_setting_is_explained(path: Path) -> None:
    found = read(path)
    assert found.about or path.name == "config.yaml"
    if not found.is_global:  # such a file gives values to settings that others explain
        settings = [each for each in found.settings if each.value is not None]
        silent = [
            each.name for each in settings if not each.comment and each.name.split(".")[-1] not in (*INTERNAL, *OBVIOUS)
        ]
        assert not silent, f"explain each in a comment beside it: {', '.join(silent)}"


def test_every_group_is_explained() -> None:
    listed = [each for each in read(CONF / "config.yaml").defaults if each.group not in ("schema", "_self_", "hydra")]
    assert [each.group for each in listed if not each.comment and not each.overrides] == []


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: each for k, v in value.items() for key, each in leaves(v, f"{name}.{k}" if name else str(k)).items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_settings_are_those_that_yaml_reads(path: Path) -> None:
    expected = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected.pop("defaults", None)
    settings = {each.name: yaml.safe_load(each.value) for each in read(path).settings if each.value is not None}
    assert settings == (leaves(expected) if expected else {})  # a file of defaults alone has none


def test_comments_are_found_where_they_may_stand(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(EXAMPLE, encoding="utf-8")
    found = read(tmp_path / "x.yaml")
    assert found.about == "The first sentence, of Author et al. 2016. The second. over lines."
    assert found.summary == "The first sentence, of Author et al. 2016"
    assert found.settings == [
        Setting("a", "1", 'one; "x"'),
        Setting("text", '"a # b"', "a text"),
        Setting("list", "[1, 2]", "Above it."),
        Setting("section", None, "of settings"),
        Setting("section.inner", "null", "in a section over two lines"),
        Setting("bare", "x", ""),
    ]
    model, base, norm = found.defaults
    assert (model.group, model.choice, model.comment) == ("model", "net", "the network")
    assert (base.group, base.choice) == ("base", None)
    assert (norm.group, norm.choice, norm.overrides) == ("norm", "local", True)
