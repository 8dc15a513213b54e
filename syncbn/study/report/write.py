"""The report: one HTML file that needs nothing else, the same as Markdown, the plots and the tables as files."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.paired_tests import is_within
from syncbn.study.format import interval, plural, signed, times
from syncbn.study.report import html, markdown, plot_style, plots, tables
from syncbn.training.atomic_write import replacing, unlinked
from syncbn.training.console import printable


def write(comparison: Comparison, directory: Path) -> Path:
    """Writes ``report.html``, ``report.md``, ``tables/*.csv`` and ``plots/*.png`` and ``*.svg``, over older ones.

    The same comparison gives the same bytes. Files that are no report's are left alone.

    Args:
        comparison: what is shown.
        directory: made if it is not there.

    Returns:
        The path of ``report.html``, a file that stands alone.
    """
    content = _content(comparison, Path(directory))
    _page(comparison.title, comparison.question, [content], Path(directory))
    return Path(directory) / "report.html"


def write_several(title: str, question: str, comparisons: Mapping[str, Comparison], directory: Path) -> Path:
    """Writes several comparisons as one page, and each as :func:`write` does, in a directory of its own.

    Args:
        title: of the page.
        question: what was asked.
        comparisons: by the names of their directories.
        directory: made if it is not there.

    Returns:
        The path of ``report.html``, a file that stands alone.
    """
    contents = {}
    for name, comparison in comparisons.items():
        contents[name] = _content(comparison, directory / name) | {"id": f"{name}-"}
        _page(comparison.title, comparison.question, [contents[name]], directory / name)
    _page(title, question, list(contents.values()), directory)
    return directory / "report.html"


def _content(comparison: Comparison, directory: Path) -> dict[str, Any]:
    """What the template gets of a comparison, whose plots and tables are written."""
    drawn = _write_plots(comparison, directory / "plots")
    _write_tables(comparison, directory / "tables")
    return {
        "id": "",
        "c": comparison,
        "computed": html.computed(),
        "counted": tables.counted(comparison),
        "figures": key_figures(comparison),
        "effects_notes": tables.effects_notes(comparison),
        "means_note": tables.MEANS_NOTE,
        "cost_note": tables.COST_NOTE,
        "plots": {plot.name: plot for plot in drawn},
        "curves": [plot for plot in drawn if plot.name.startswith("curves")],
        "tables": tables.build(comparison),
        "directory": directory.name,
        "svg": partial(html.svg, directory / "plots"),
    }


def _page(title: str, question: str, contents: list[dict[str, Any]], directory: Path) -> None:
    template = html.environment().get_template("report.html.jinja")
    several = len(contents) > 1
    page = template.render(title=title, question=question, reports=contents, several=several)
    text = markdown.index(title, question, contents) if several else markdown.render(contents[0])
    for name, written in {"report.html": page, "report.md": text}.items():
        with replacing(directory / name) as draft:
            draft.write_text(written, encoding="utf-8", errors="surrogateescape")


def key_figures(comparison: Comparison) -> list[tuple[str, str]]:
    """The few numbers that stand beside the verdict: a number, and what it is."""
    unit, effects = comparison.metric.difference_unit, comparison.effects
    figures = []
    if effects.difference.notna().any():
        row = effects.loc[effects.difference.astype(float).abs().idxmax()]
        what = f"{row.side} minus {comparison.baseline}{f' at {row.condition}' if row.condition else ''}"
        range_ = interval(row.low, row.high, unit, sign=True)
        figures.append(
            (
                f"{signed(row.difference, unit)} {unit}".strip(),
                f"{comparison.metric.label}, {what}: the largest difference (95 %: {range_})",
            )
        )
        equal, within = sum(is_within(p, comparison.alpha) for p in effects.p_tost), tables.margin_text(comparison)
        figures.append((f"{equal} of {len(effects)}", f"differences are shown to be small, that is within {within}"))
    cost = comparison.cost[comparison.cost.side != comparison.baseline]
    if cost.ratio.notna().any():
        row = cost.loc[cost.ratio.astype(float).idxmax()]
        what = f"{row.side} over {comparison.baseline}{f' at {row.condition}' if row.condition else ''}"
        figures.append((times(row.ratio), f"time per step, {what}: the most there is ({plural(row.pairs, 'pair')})"))
    used = int(comparison.runs.used.sum())
    figures.append((f"{used} of {len(comparison.runs)}", "runs are in pairs of one seed"))
    return figures


def _write_plots(comparison: Comparison, directory: Path) -> list[plot_style.Plot]:
    unlinked(directory).mkdir(parents=True, exist_ok=True)
    for path in [path for kind in ("png", "svg") for path in plots_in(directory, kind)]:
        path.unlink()  # what an earlier report had and this one has not must not stay beside it
    with plot_style.style():
        drawn = plots.draw(comparison)
        plot_style.save(drawn, directory)
    return drawn


def _write_tables(comparison: Comparison, directory: Path) -> None:
    unlinked(directory).mkdir(parents=True, exist_ok=True)
    for name in tables.FRAMES:
        flat_frame(getattr(comparison, name)).to_csv(
            unlinked(directory / f"{name}.csv"), index=False, errors="surrogateescape"
        )


def plots_in(directory: Path, kind: str) -> list[Path]:
    """A report's files; others may lie beside them."""
    return [path for path in sorted(directory.glob(f"*.{kind}")) if plots.NAMES.fullmatch(path.stem)]


def flat_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Without tuples in cells, and each text in one line."""

    def flat(cell: Any) -> Any:
        if isinstance(cell, tuple):
            return "; ".join(map(repr, map(float, cell)))
        return printable(cell) if isinstance(cell, str) else cell

    return frame.map(flat)
