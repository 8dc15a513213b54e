"""The sdist holds all files that its documents link to."""

import re
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
HATCH = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
INCLUDED = [REPO / name for name in HATCH["sdist"]["include"]]
FOLDERS = [path for path in INCLUDED if path.is_dir()]
PAGES = sorted([*REPO.glob("*.md"), *(page for folder in FOLDERS for page in folder.rglob("*.md"))])
LINK = re.compile(r"\]\((?!https?:|mailto:|#)<?([^)#\s>]+)")


def is_included(path: Path) -> bool:
    return any(path == each or path.is_relative_to(each) for each in INCLUDED)


def test_the_files_of_the_list_exist() -> None:
    assert [str(path) for path in INCLUDED if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_into_the_sdist(page: Path) -> None:
    assert is_included(page)
    targets = [(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))]
    assert [str(target) for target in targets if not (target.exists() and is_included(target))] == []


def test_the_build_of_a_wheel_finds_its_files() -> None:
    packages = [REPO / name for name in HATCH["wheel"]["packages"]]
    assert all(is_included(path) for path in (*packages, REPO / "conf", REPO / "hatch_build.py"))


def test_a_page_with_links_is_among_them() -> None:
    assert LINK.findall((REPO / "README.md").read_text(encoding="utf-8"))
