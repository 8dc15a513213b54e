"""Text in a comparison's plots: labels of rows, headings of panels, and common sentences of captions."""

import re
import textwrap

import pandas as pd

from syncbn.study.compare.comparison import Comparison
from syncbn.study.format import plural
from syncbn.study.report.plots.plot_style import short
from syncbn.study.report.tables import ways

AXES = {
    "data.batch_size": "batch size per device (samples)",
    "data.global_batch_size": "batch size over all devices (samples)",
    "norm.batch_size": "normalization batch (samples)",
    "norm.group": "devices that share statistics",
    "trainer.devices": "devices",
    "optimizer.lr": "learning rate",
}


def row_labels(comparison: Comparison, frame: pd.DataFrame, whole: pd.DataFrame) -> list[str]:
    """Labels of the shown rows of a table: layer, condition, side and how, if the table has several of them."""
    columns = [list(frame.layer)] if "layer" in frame.columns else []
    if len(comparison.conditions) > 1:
        columns.append(brief(list(frame.condition)))
    if whole.side.nunique() > 1 or not columns:
        columns.append(list(frame.side))
    if "how" in frame.columns and frame.how.nunique() > 1:
        columns.append(["" if how == ways(comparison)[0] else how for how in frame.how])
    return [_joined([str(part) for part in parts if part]) for parts in zip(*columns, strict=True)]


def _joined(parts: list[str], length: int = 44) -> str:
    """Joins the parts of a label. If it is too long, the longest parts are shortened first."""
    while len(" · ".join(parts)) > length and max(map(len, parts)) > 8:
        longest = max(range(len(parts)), key=lambda at: len(parts[at]))
        over = len(" · ".join(parts)) - length
        parts[longest] = short(parts[longest], max(8, (len(parts[longest]) - over) // 2 * 2))
    return short(" · ".join(parts), length)


def brief(conditions: list[str]) -> list[str]:
    """Shortens the labels of conditions, as far as they stay distinct.

    Settings that all conditions share are dropped, and names lose their group: ``batch_size=2`` for
    ``data.batch_size=2``.
    """
    parts = [condition.split() for condition in conditions]
    shared = set.intersection(*map(set, parts)) if len(set(conditions)) > 1 else set()
    different = [" ".join(part for part in of_one if part not in shared) for of_one in parts]
    shorter = [re.sub(r"[\w.]+\.(?=\w+=)", "", condition) for condition in different]
    for candidate in (shorter, different):
        if len(set(candidate)) == len(set(conditions)) and all(candidate):
            return candidate
    return conditions


def heading(text: str) -> str:
    """The heading of a panel, on at most two lines."""
    lines = textwrap.wrap(text, 24, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join(short(line, 24) for line in [lines[0], " ".join(lines[1:])] if line)


def hollow(comparison: Comparison) -> str:
    """A sentence on filled and hollow markers for the ways of running; "" if all runs ran the same way."""
    first, *others = ways(comparison)
    return f" Filled markers: {first}; hollow ones: {', '.join(others)}." if others else ""


def unsaid(comparison: Comparison, frame: pd.DataFrame) -> str:
    """A sentence on how the rows ran, as far as :func:`row_labels` omits it."""
    first, *others = ways(comparison)
    if frame.how.nunique() > 1:
        return f" Rows that do not say how they were run: {first}." if (frame.how == first).any() else ""
    return f" All as {frame.how.iloc[0]}." if others else ""


def left_out(there: int, shown: int, what: str) -> str:
    """A sentence with the number of items that are not shown; "" if all are shown."""
    return f" Not shown: {plural(there - shown, what)} more." if there > shown else ""


def first_upper(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
