"""The report as Markdown, in the order of the page (``report.html.jinja``), with links to the plots' files."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from syncbn.study import format
from syncbn.study.report.plot_style import Plot
from syncbn.study.report.tables import Table
from syncbn.training.console import printable


def render(content: dict[str, Any]) -> str:
    """The whole page, from what the template gets."""
    return "\n\n".join(block for block in _blocks(content) if block) + "\n"


def index(title: str, question: str, contents: Sequence[dict[str, Any]]) -> str:
    """Several comparisons: the answer of each, with a link to its page, and then each in full."""
    answers = [
        f"1. [{escape(content['c'].title)}]({content['directory']}/report.md): {escape(content['c'].verdict)}"
        for content in contents
    ]
    blocks = [f"# {escape(title)}", escape(question), "\n".join(answers)]
    for content in contents:
        blocks += _blocks(content, f"{content['directory']}/", "#")
    return "\n\n".join(filter(None, blocks)) + "\n"


def escape(text: str) -> str:
    """As text that is no markup, in one line."""
    text = printable(" ".join(text.split()))
    text = re.sub(r"([\\`*\[\]<>|~&$!])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # within a word it is a letter
    return re.sub(r"^(\d+)?([-+#=.)])(?= |$|#)", r"\1\\\2", text)


def _blocks(content: dict[str, Any], place: str = "", deeper: str = "") -> Iterator[str]:
    """Of one comparison, whose files lie in ``place``; ``deeper`` goes before each heading."""
    c, tables, plots = content["c"], content["tables"], content["plots"]
    yield f"{deeper}# {escape(c.title)}"
    yield escape(c.question)
    yield f"**{escape(c.verdict)}**" if c.verdict else ""
    yield "\n".join(f"- **{escape(figure)}** {escape(what)}" for figure, what in content["figures"])
    if c.problems:
        yield f"{deeper}## {format.plural(len(c.problems), 'thing')} to know before believing this"
        yield bullets(c.problems)
    yield f"{deeper}## What was run"
    yield _facts("What differs between the sides", c.differs)
    yield _facts("What all runs share", c.constant)
    yield _facts("Runs", content["counted"])
    yield f"{deeper}## The answer"
    yield figure(plots["metric"], place)
    yield figure(plots["effects"], place)
    if "effects" in tables:
        yield f"{deeper}### Differences from {escape(c.baseline)}, between runs of the same seed"
        yield table(tables["effects"], place)
        yield "\n".join(f"- **{escape(term)}**: {escape(meaning)}" for term, meaning in content["effects_notes"])
    if "means" in tables:
        yield f"{deeper}### Means of each side"
        yield table(tables["means"], place)
        yield escape(content["means_note"])
    yield f"{deeper}## Seed by seed, and epoch by epoch"
    yield figure(plots["seeds"], place)
    for plot in content["curves"]:
        yield figure(plot, place)
    yield f"{deeper}## Cost"
    yield figure(plots["cost"], place)
    yield table(tables.get("cost"), place)
    yield escape(content["cost_note"]) if "cost" in tables else ""
    yield f"{deeper}## Layers"
    yield f"**Suggestion:** {escape(c.suggestion)}" if c.suggestion else ""
    yield figure(plots["layers"], place)
    yield table(tables.get("layers"), place)
    yield f"{deeper}## Expected and published figures"
    yield table(tables.get("expected"), place, "No published or expected figure was given for this comparison.")
    yield f"{deeper}## One process against several"
    yield table(
        tables.get("confirmations"), place, "No settings ran both in one process and with a process for each device."
    )
    yield f"{deeper}## Every run"
    yield table(tables.get("runs"), place, "No run was looked at.")
    yield f"{deeper}## How to make this page again"
    yield "\n".join(f"    {line}" for line in c.command.splitlines())
    yield escape(content["computed"])


def table(shown: Table | None, place: str, instead: str = "") -> str:
    """A table, with a link to its file in ``place``; or what is to be said where there is none."""
    if shown is None:
        return instead
    lines = [shown.columns, *shown.rows]
    rows = [f"| {' | '.join(escape(cell) for cell in line)} |" for line in lines]
    rows.insert(1, f"|{'|'.join('--:' if numeric else '---' for numeric in shown.numeric)}|")
    return "\n".join(rows) + f"\n\n[all digits]({place}tables/{shown.name}.csv)"


def figure(plot: Plot, place: str) -> str:
    """A plot of ``place``, or why there is none."""
    if plot.figure is None:
        return escape(plot.caption)
    title = escape(plot.title)
    return f"![{title}]({place}plots/{plot.name}.png)\n\n**{title}.** {escape(plot.caption)}"


def _facts(title: str, lines: Sequence[str]) -> str:
    return f"{title}:\n\n{bullets(lines)}" if lines else ""


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {escape(line)}" for line in lines)
