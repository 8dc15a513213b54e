"""Settings of the documentation site: ``make docs`` builds it into ``docs/_build/html``."""

import re
from pathlib import Path

from sphinx.application import Sphinx

import syncbn

project = "syncbn"
author = "the syncbn authors"
version = release = syncbn.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "results/**/tables"]
suppress_warnings = ["toc.not_included"]  # the parts of a study's report: its first page links to them
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
html_theme = "furo"
html_title = "syncbn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # a link to a heading that does not exist is an error
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"  # otherwise a list of arguments appears again below Raises
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"


# Pages that show a file from elsewhere in the repository, by their names.
SHOWN = {"benchmarks": "benchmarks/README.md", "guide/slurm": "slurm/README.md", "contributing": "CONTRIBUTING.md"}
REPO = Path(__file__).parents[1]


def setup(app: Sphinx) -> None:
    """Registers what the pages need besides the extensions."""
    app.connect("source-read", _for_the_site)


def _for_the_site(app: Sphinx, name: str, source: list[str]) -> None:
    """Turns what GitHub shows into what Sphinx does: HTML anchors, and links to files outside of ``docs``."""
    page = REPO / SHOWN[name] if name in SHOWN else REPO / "docs" / f"{name}.md"
    text = page.read_text(encoding="utf-8") if name in SHOWN else source[0]
    text = re.sub(r'<a id="([\w-]+)"></a>', r"(\1)=", text)
    root = "../" * name.count("/")
    source[0] = re.sub(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)", lambda link: _link(link, page, root), text)


def _link(link: "re.Match[str]", page: Path, root: str) -> str:
    words, target, anchor = link[1], link[2], link[3] or ""
    try:
        file = (page.parent / target).resolve().relative_to(REPO).as_posix()
    except ValueError:
        return link[0]
    shown = next((name for name, each in SHOWN.items() if each == file), None)
    if shown is not None:
        return f"[{words}]({root}{shown}.md{anchor})"
    if file.startswith("docs/"):
        return f"[{words}]({root}{file.removeprefix('docs/')}{anchor})"
    if file.endswith(".png"):
        return f"[{words}]({root}../{file})"
    return f"{words} (`{file}`)" if (REPO / file).exists() else link[0]
