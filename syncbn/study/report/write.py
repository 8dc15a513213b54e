"""Writes the report of one or several comparisons: a self-contained HTML file, Markdown, plots and tables.

:mod:`syncbn.study.report.read` reads the tables, so that a page can be written again without the runs.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd

from syncbn.study.compare.comparison import Comparison
from syncbn.study.report import answer, blocks, examples, expectations, tables
from syncbn.study.report.blocks import Block, Group, escape
from syncbn.study.report.comparison_page import comparison_page
from syncbn.study.report.examples import Examples
from syncbn.study.report.expectations import Answer
from syncbn.study.report.plots import comparison_plots, plot_style
from syncbn.training.atomic_write import replacing, unlinked
from syncbn.training.console import printable

COMPARISON, PARTS = "comparison.json", "parts.json"


def write(comparison: Comparison, directory: Path) -> Path:
    """Writes ``report.html``, ``report.md``, ``tables/*.csv``, ``plots/*.png`` and ``*.svg``; replaces older ones.

    Equal comparisons produce identical files. The directory is created if it does not exist; other files in it stay.

    Returns:
        The path of ``report.html``, which is self-contained.
    """
    _write_page(comparison, directory)
    return directory / "report.html"


def write_several(
    title: str,
    question: str,
    comparisons: Mapping[str, Comparison],
    directory: Path,
    *,
    expected: Sequence[Answer] = (),
    shown: Examples | None = None,
) -> Path:
    """Writes several comparisons as one page, and also each as :func:`write` does, in its own directory.

    The comparisons are given by the names of their directories, which are created in ``directory``. ``expected`` are
    the study's expected effects, which are the first on the page. ``shown`` are images with predictions.

    Returns:
        The path of ``report.html``, which is self-contained.
    """
    articles = []
    unlinked(directory).mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"title": title, "question": question, "parts": list(comparisons)}
    about |= {"expected": [asdict(each) for each in expected]} if expected else {}
    _write_json(about, directory / PARTS)
    for name, comparison in comparisons.items():
        drawn = _write_page(comparison, directory / name)
        article = comparison_page(comparison, drawn, directory / name, f"{name}/")
        articles.append(Group(article, "article", "part-of-several", f"{name}-top"))
    path = directory / "report.html"
    head = [Block(f"# {escape(title)}"), Block(escape(question), "question"), *expectations.blocks(expected)]
    blocks.write([*head, _answers(comparisons), *examples.write(shown, directory), *articles], title, path)
    return path


def _write_page(comparison: Comparison, directory: Path) -> list[plot_style.Plot]:
    """Writes the files of a comparison and returns its plots."""
    drawn = _write_plots(comparison, directory / "plots")
    frames = {name: getattr(comparison, name) for name in tables.FRAMES}
    write_frames(frames, directory / "tables")
    rest = {each.name: getattr(comparison, each.name) for each in fields(comparison) if each.name not in frames}
    metric = {name: _finite(value) for name, value in asdict(comparison.metric).items()}
    rest |= {"metric": metric, "margin": _finite(comparison.margin)}
    _write_json(rest, directory / "tables" / COMPARISON)
    blocks.write(comparison_page(comparison, drawn, directory), comparison.title, directory / "report.html")
    return drawn


def _answers(comparisons: Mapping[str, Comparison]) -> Block:
    """The answer of each comparison, with a link to its page; in HTML, to its part of this page."""
    answers = [
        f"1. [{escape(each.title)}]({name}/report.md): {escape(f'{answer.sentence(each)} {answer.brief_cost(each)}')}"
        for name, each in comparisons.items()
    ]
    linked = partial(re.sub, r'href="([^"]*)/report\.md">(.*?)</a>:', r'href="#\1-top">\2</a>')
    return Block("\n".join(answers), "answers", finish=linked)


def _write_plots(comparison: Comparison, directory: Path) -> list[plot_style.Plot]:
    unlinked(directory).mkdir(parents=True, exist_ok=True)
    for path in [path for kind in ("png", "svg") for path in plots_in(directory, kind)]:
        path.unlink()  # otherwise plots that the new report lacks would stay
    with plot_style.style():
        drawn = comparison_plots.draw(comparison)
        plot_style.save(drawn, directory)
    return drawn


def write_frames(frames: Mapping[str, pd.DataFrame], directory: Path) -> None:
    """Writes ``NAME.csv`` for each frame."""
    unlinked(directory).mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        flat_frame(frame).to_csv(unlinked(directory / f"{name}.csv"), index=False, errors="surrogateescape")


def flat_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame for a flat file: tuples become text, and each text is on one line."""

    def flat(cell: Any) -> Any:
        if isinstance(cell, tuple):
            return "; ".join(map(repr, map(float, cell)))
        return printable(cell) if isinstance(cell, str) else cell

    return frame.map(flat)


def plots_in(directory: Path, kind: str) -> list[Path]:
    """The plot files of a report; the directory may contain other files."""
    return [path for path in sorted(directory.glob(f"*.{kind}")) if comparison_plots.NAMES.fullmatch(path.stem)]


def _write_json(contents: Mapping[str, Any], path: Path) -> None:
    """Writes what the tables lack; :mod:`syncbn.study.report.read` reads it."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(contents, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """None for a number that JSON does not have."""
    return None if isinstance(value, float) and not isfinite(value) else value
