"""``docs/guide/runs.md`` and ``docs/guide/predict.md`` name options and statuses that exist, and all of them."""

import re

import pytest
from typer.main import get_command

from syncbn import cli
from tests.training.support.train_command import REPO

PAGES = {"runs": "runs", "evaluate": "runs", "predict": "predict"}


@pytest.mark.parametrize("command", PAGES)
def test_the_page_has_every_option(command: str) -> None:
    page = (REPO / f"docs/guide/{PAGES[command]}.md").read_text(encoding="utf-8")
    options = {name for each in get_command(cli.app).commands[command].params for name in each.opts if name[:2] == "--"}
    named = set(re.findall(r"--[a-z-]+[a-z]", page))
    assert options - {"--help"} <= named


def test_the_pages_name_no_other_option() -> None:
    every = {name for each in PAGES for param in get_command(cli.app).commands[each].params for name in param.opts}
    for page in {*PAGES.values()}:
        named = set(re.findall(r"(?<!-)--[a-z-]+[a-z]", (REPO / f"docs/guide/{page}.md").read_text(encoding="utf-8")))
        assert named <= every
