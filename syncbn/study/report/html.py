"""What pages have in common: how templates are read, plots inside a page, and what computed it."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from syncbn.study.report import plot_style
from syncbn.study.report.plot_style import Plot
from syncbn.training.console import printable

LIBRARIES = ("syncbn", "scipy", "pandas", "matplotlib")


def environment() -> Environment:
    """Reads the templates in ``templates/``; text is escaped, and a name that is not there is an error."""
    environment = Environment(
        loader=PackageLoader("syncbn.study.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_readable,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _readable(value: Any) -> Any:
    """Text of a run as it can be read; line breaks are spaces in HTML, and markup is ours."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(map(printable, value.split("\n")))


def svg(plots: Path, plot: Plot, prefix: str) -> Markup:
    """A plot of that directory as part of a page; ``prefix`` is of its identifiers."""
    return Markup(plot_style.inline(plots / f"{plot.name}.svg", str(escape(printable(plot.title))), prefix))


def computed() -> str:
    """The line on versions, and on where all digits are."""
    return (
        f"Computed from the run directories by {', '.join(f'{name} {version(name)}' for name in LIBRARIES)}."
        " Numbers are rounded here; the files in tables/ have all digits, those in plots/ are the figures."
    )


def _breakable(text: str) -> Markup:
    """A line may break after the slashes of paths and the commas of settings."""
    return Markup(re.sub(r"([/,])(?=\w{3})", r"\1<wbr>", str(escape(printable(text)))))
