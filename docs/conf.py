"""Settings of the documentation site: ``make docs`` builds it into ``docs/_build/html``."""

import re

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
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
html_theme = "furo"
html_title = "syncbn"
html_static_path: list[str] = []
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4  # a link to a heading that does not exist is an error
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"


def setup(app: Sphinx) -> None:
    """Registers what the pages need besides the extensions."""
    app.connect("source-read", _targets)


def _targets(app: Sphinx, name: str, source: list[str]) -> None:
    """Turns HTML anchors, which GitHub understands, into MyST's targets."""
    source[0] = re.sub(r'<a id="([\w-]+)"></a>', r"(\1)=", source[0])
