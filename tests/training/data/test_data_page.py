"""``docs/guide/data.md`` names settings that exist."""

import re

import pytest
from omegaconf import OmegaConf

from tests.training.support.train_command import REPO

PAGE = (REPO / "docs/guide/data.md").read_text(encoding="utf-8")


def keys(group: str) -> set[str]:
    files = (REPO / "conf" / group).glob("*.yaml")
    return {str(key) for file in files for key in OmegaConf.load(file)}


@pytest.mark.parametrize("group", ["data", "augment", "mix"])
def test_the_page_names_settings_and_files_that_exist(group: str) -> None:
    named = set(re.findall(rf"`{group}\.([a-z_]+)", PAGE)) - {"json"}  # a file
    assert named
    assert named <= keys(group)
    chosen = set(re.findall(rf"\b{group}=([a-z_0-9]+)", PAGE))
    assert chosen <= {file.stem for file in (REPO / "conf" / group).glob("*.yaml")}
