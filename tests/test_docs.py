"""The links of all pages lead somewhere, in the repository as GitHub shows it. Links to other sites are not fetched."""

import ast
import importlib
import re
import runpy
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

import syncbn
from syncbn import nn, testing, training
from syncbn.training import data
from tests.support.markdown_pages import REPO, anchors, broken_links, links, pages, tracked

WITH_PYTHON = [page for page in pages() if "```python" in page.read_text(encoding="utf-8")]
EXTERNAL = re.compile(r"(https?:|mailto:)")
SHOWN = {
    "guide/slurm.md": "slurm/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
}


def dead_links(page: Path) -> list[str]:
    """The relative links of a page to a file or a heading that the repository does not have."""
    dead = []
    for link in links(page):
        name, _, anchor = link.target.partition("#")
        target = (page.parent / name).resolve() if name else page
        if EXTERNAL.match(link.target):
            continue
        if target not in tracked() or not target.exists():
            dead.append(f"{link.target}: there is no such file")
        elif anchor and anchor not in anchors(target):
            dead.append(f"{link.target}: there is no such heading")
    return dead


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert dead_links(page) == []
    assert broken_links(page) == []
    assert [link.target for link in links(page) if not link.text.strip()] == []


def test_a_page_with_dead_links_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `name`, a heading\n\n# Twice\n\n# Twice\n\n[file](none.md) [heading](#none) [](page.md) [text] (page.md)\n"
        "[one](#a-name-a-heading), [two](#twice-1), [three](page.md#twice), [site](https://example.org/#no) `[x](y)`\n",
        encoding="utf-8",
    )
    monkeypatch.setattr("tests.test_docs.tracked", lambda: {page})
    assert dead_links(page) == ["none.md: there is no such file", "#none: there is no such heading"]
    assert [link.target for link in links(page) if not link.text] == ["page.md"]
    assert broken_links(page) == [" [text] (page.md)"]


def test_each_page_of_the_site_is_in_its_contents() -> None:
    """The parts of a study's report are linked from its first page."""
    index = (REPO / "docs/index.md").read_text(encoding="utf-8")
    api = (REPO / "docs/api/index.md").read_text(encoding="utf-8").replace("\n", "\napi/")
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", index + api, re.DOTALL)
    listed = [line.rpartition("<")[2].strip(">") for block in blocks for line in block.splitlines()]
    names = {
        page.relative_to(REPO / "docs").with_suffix("").as_posix() for page in pages() if REPO / "docs" in page.parents
    }
    first_pages = {name for name in names if name.count("/") < 2} - {"index"}
    assert {name for name in first_pages if not any(fnmatch(name, pattern) for pattern in listed)} == set()


@pytest.mark.parametrize(("page", "source"), SHOWN.items())
def test_a_page_that_shows_another_file_names_it(page: str, source: str) -> None:
    assert f"[`{source}`]" in (REPO / "docs" / page).read_text(encoding="utf-8")
    name = page.removesuffix(".md")
    assert f'"{name}": "{source}"' in (REPO / "docs/conf.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [syncbn, nn, testing, training, data])
def test_every_public_name_is_in_the_api_reference(module: ModuleType) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in sorted((REPO / "docs/api").glob("*.md")))
    listed = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", reference, re.MULTILINE)}
    names = getattr(module, "__all__", None) or defined(module)
    assert set(names) - listed == set()


def defined(module: ModuleType) -> list[str]:
    """The public functions of a module that lists none."""
    of_it = (name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__)
    return [name for name in of_it if not name.startswith("_")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(REPO)))
def test_python_on_a_page_is_valid_and_imports_names_that_exist(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("syncbn"):
                module = importlib.import_module(str(node.module))
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_the_figures_are_those_of_the_tables(tmp_path: Path) -> None:
    """Byte by byte, with the tested versions of matplotlib and its fonts."""
    figures = REPO / "docs/figures"
    runpy.run_path(str(figures / "error_by_samples.py"))["main"](tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in drawn] == sorted(path.name for path in figures.glob("*.svg"))
    for path in drawn:
        assert path.read_bytes() == (figures / path.name).read_bytes()
