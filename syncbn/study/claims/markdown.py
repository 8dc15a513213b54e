"""The page of the claims as Markdown, in the order of the page (``claims.html.jinja``)."""

from collections.abc import Iterator
from typing import Any

from syncbn.study.format import plural
from syncbn.study.report.markdown import bullets, escape, figure, table


def render(content: dict[str, Any]) -> str:
    """The whole page, from what the template gets."""
    return "\n\n".join(block for block in _blocks(content) if block) + "\n"


def _blocks(content: dict[str, Any]) -> Iterator[str]:
    yield f"# {escape(content['title'])}"
    yield escape(content["question"])
    yield _matrix(content)
    yield " ".join(f"{escape(side)}: {escape(words)}." for side, words, _ in content["norms"] if words)
    yield "## How to read this"
    yield bullets(content["how"])
    for word, told in content["shared"]:
        yield f"## Where synchronized statistics do {word} than per-device ones"
        lines = [f"- {_link(one)}: {escape(line)}" for one, line in told]
        yield "\n".join(lines) or escape(content["none_shown"])
    if content["problems"]:
        yield f"## {plural(len(content['problems']), 'thing')} to know before believing this"
        yield bullets([f"{claim}: {line}" if claim else line for claim, line in content["problems"]])
    for claim in content["claims"]:
        yield from _claim(claim)
    yield "## Runs and versions"
    yield table(content["overall"]["tables"]["verdicts"], "")
    yield escape(content["computed"])


def _matrix(content: dict[str, Any]) -> str:
    heads = ["claim", *(f"{side}, against {other}" for side, _, other in content["norms"]), "sync against local"]
    rows = [[_link(one), *(escape(words) for words, _ in cells)] for one, cells in content["matrix"]]
    lines = [[escape(head) for head in heads], ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _claim(claim: dict[str, Any]) -> Iterator[str]:
    f, tables = claim["f"], claim["tables"]
    yield f'<a id="{f.study}"></a>'
    yield f"## {f.number}. {escape(f.text)}"
    yield f"*The claim:* {escape(f.article)}" if f.article else ""
    yield f"*The test:* {escape(f.method)}" if f.method else ""
    yield "\n".join(f"- **{escape(side)}**: {escape(words)}" for side, words, _ in claim["verdicts"])
    for plot in claim["plots"]:
        yield figure(plot, "")
    yield "### Each case, norm by norm"
    yield table(tables.get("cases"), "", "No case has a row.")
    yield "### Synchronized against per-device statistics"
    yield table(tables.get("versus"), "", "No case has both.")
    yield "### The literature's figures"
    yield table(tables.get("published"), "", "No published figure was given for this claim.")
    yield "### Runs"
    yield escape(claim["counted"])
    yield "\n".join(f"    {line}" for line in f.command.splitlines())


def _link(one: Any) -> str:
    return f"[{one.number}. {escape(one.text)}](#{one.study})"
