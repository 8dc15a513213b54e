"""Prints a comparison in the terminal, in up to 100 columns: the answer, the problems, and on request all tables."""

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.paired_tests import is_within
from syncbn.study.format import MISSING, plural, probability, rounded
from syncbn.study.report import answer
from syncbn.study.report.ranges import difference_interval
from syncbn.study.report.symbol_matrix import Cell, legend, symbol_matrix
from syncbn.study.report.tables import COST_NOTE, TOLERANCE_NOTE, has_tolerances, margin_text
from syncbn.training.console import cell, printable

WIDTH = 100  # if the output is a file or a pipe
MOST_LAYERS = 8
MOST_SIDES = 4  # for more sides, the table has rows instead of columns
WORDS = ("condition", "as", "side", "what", "layer")  # columns of text, which may wrap
WITHIN = ", within"  # a difference is shown, and shown to be within the margin
STYLES = {
    "lower": "bold green",
    "higher": "bold green",
    f"lower{WITHIN}": "green",
    f"higher{WITHIN}": "green",
    "no difference": "green",
    "undecided": "yellow",
    "no": "bold red",
}
TONES = {"better": "bold green", "worse": "bold red", "same": "green", "open": "yellow"}


def show(comparison: Comparison, console: Console, *, details: bool = False) -> None:
    """Prints the answer, and with ``details`` also the tables it rests on. Long text wraps; nothing is cut."""
    if not console.is_terminal:
        console.width = WIDTH
    c = comparison
    console.print(cell(c.title, "bold"))
    for line in filter(None, c.question.splitlines()):
        console.print(cell(line, "dim"))
    if details:
        _show_details(c, console)
    console.print()
    console.print(cell(answer.sentence(c), "bold"))
    _print(console, "", _matrix(c))
    for line in legend(c):
        console.print(cell(line, "dim"))
    console.print(cell(answer.cost(c)))
    if c.problems:
        console.print()
        console.print(cell("What to know before believing it:", "bold red"))
    for line in c.problems:
        console.print(cell(f"! {line}", "red"))


def _show_details(c: Comparison, console: Console) -> None:
    unit = f" {c.metric.unit}" if c.metric.unit else ""
    finished = int((c.runs["status"] == "finished").sum())
    counts = f"{len(c.runs)} runs, {finished} of them finished, {int(c.runs['used'].sum())} of them in pairs"
    console.print()
    for line in [counts, *c.differs]:
        console.print(cell(line))
    several = c.effects["how"].nunique() > 1
    _print(console, f"{c.metric.label}{unit}: mean ± standard deviation over seeds", _means(c, several))
    points = f" in {c.metric.difference_unit}" if c.metric.difference_unit else ""
    _print(console, f"difference from {c.baseline}{points}, over pairs of one seed", _effects(c, several))
    same = f"that the difference is beyond {margin_text(c)} (TOST)"
    console.print(cell(f"p: paired t test; p same: {same}; both by Holm for all rows, at {c.alpha:g}", "dim"))
    ran = set(c.cost["how"])
    where = next(iter(ran)) if len(ran) == 1 else "with a process for each device"
    _print(console, f"time of a step, {where}", _cost(c, len(ran) > 1))
    if not c.cost.empty:
        console.print(cell(COST_NOTE, "dim"))
    _print(console, "layers, those that need shared statistics first", _layers(c))
    if c.suggestion:
        console.print(cell(c.suggestion))
    ours = f" ({TOLERANCE_NOTE})" if has_tolerances(c) else ""
    _print(console, f"published or expected figures{ours}", _expected(c))
    if not c.confirmations.empty:
        console.print()
        count, most = len(c.confirmations), c.confirmations["difference"].abs().max()
        runs = f"{plural(count, 'run')} in one process {'was' if count == 1 else 'were'} confirmed by processes"
        console.print(cell(f"{runs}: at most {most:.3g}{f' {c.metric.difference_unit}'.rstrip()} apart"))


def _print(console: Console, title: str, table: Table) -> None:
    if table.row_count:
        console.print()
        if title:
            console.print(cell(title))
        console.print(table)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table without empty columns. Text is left-aligned and wraps; numbers are right-aligned and never cut."""
    kept = [place for place, _ in enumerate(columns) if any(str(row[place]) for row in rows)]
    table = Table(box=box.HORIZONTALS, header_style="bold", padding=(0, 1), pad_edge=False, collapse_padding=True)
    for place in kept:
        is_word = columns[place] in WORDS
        table.add_column(
            cell(columns[place]),
            justify="left" if is_word else "right",
            no_wrap=not is_word,
            overflow="fold" if is_word else "ellipsis",
            min_width=None if is_word else max(len(printable(row[place])) for row in rows),
        )
    for row in rows:
        table.add_row(*(cell(str(row[place]), STYLES.get(str(row[place]), "")) for place in kept))
    return table


def _matrix(c: Comparison) -> Table:
    matrix = symbol_matrix(c)
    table = Table(box=box.HORIZONTALS, header_style="bold", padding=(0, 1), pad_edge=False, collapse_padding=True)
    for place, head in enumerate(matrix.columns):
        table.add_column(cell(head), justify="right" if place == 1 else "left", no_wrap=place > 1)
    for label, mean, cells in matrix.rows:
        table.add_row(cell(label), cell(mean), *(_symbol_cell(each, len(matrix.columns) > 4) for each in cells))
    return table


def _symbol_cell(shown: Cell, two_lines: bool) -> Text:
    parts = (shown.symbol, shown.difference, shown.interval)
    if not two_lines or not shown.interval:
        return cell(" ".join(filter(None, parts)), TONES.get(shown.tone, ""))
    return Text("\n").join([cell(" ".join(parts[:2]), TONES.get(shown.tone, "")), cell(f"  {shown.interval}", "dim")])


def _means(c: Comparison, several: bool) -> Table:
    """A row for each condition and a column for each side; with many sides, a row for each of both."""
    rows = []
    for (condition, how), here in c.means.groupby(["condition", "how"], sort=False):
        of = {row["side"]: _mean(row) for row in here.to_dict("records")}
        at = _condition_cells(c, {"condition": condition, "how": how}, several)
        if len(c.sides) > MOST_SIDES:
            rows += [[*at, side, of[side]] for side in c.sides if side in of]
        else:
            rows.append([*at, *(of.get(side, "—") for side in c.sides)])
    return _table([_axis(c), "as", *(["side", "mean"] if len(c.sides) > MOST_SIDES else c.sides)], rows)


def _mean(row: dict[str, Any]) -> str:
    spread = "" if math.isnan(row["sd"]) else f" ± {row['sd']:.2g}"
    return f"{row['mean']:.4g}{spread} ({row['n']})"


def _effects(c: Comparison, several: bool) -> Table:
    rows = []
    for row in c.effects.to_dict("records"):
        difference = rounded(row["difference"], row["low"], row["high"], sign=True)
        interval = difference_interval(c, row, ", ")
        interval = interval if interval == MISSING else f"[{interval}]"
        figures = [row["n"], difference, interval, probability(row["p_holm"]), probability(row["p_tost"])]
        verdict = row["verdict"]
        if verdict in ("lower", "higher") and is_within(row["p_tost"], c.alpha):
            verdict += WITHIN
        rows.append([*_condition_cells(c, row, several), row["side"], *figures, verdict])
    columns = [_axis(c), "as", "side", "pairs", "difference", "95 % interval", "p", "p same", "verdict"]
    return _table(columns, rows)


def _cost(c: Comparison, several: bool) -> Table:
    rows = []
    for row in c.cost.to_dict("records"):
        ratio = "—" if math.isnan(row["ratio"]) else f"{row['ratio']:.2f}"
        spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}".replace("nan to nan", "—")
        of_ratio = ["", ""] if row["side"] == c.baseline else [row["pairs"], spread]
        share = "" if math.isnan(row["collectives"]) else f"{100 * row['collectives']:.0f} %"
        time = [f"{1e3 * row['seconds_per_step']:.3g} ms", f"{row['images_per_second']:,.0f}"]
        rows.append([*_condition_cells(c, row, several), row["side"], *time, ratio, *of_ratio, share])
    return _table([_axis(c), "as", "side", "step", "images/s", "ratio", "pairs", "over seeds", "in collectives"], rows)


def _layers(c: Comparison) -> Table:
    """The layers of the first monitored side, on which the suggestion is based."""
    rows: list[list[str]] = []
    monitored = set(c.layers["side"])
    side = next((side for side in c.sides if side in monitored), "")
    table = c.layers[c.layers["side"] == side]
    for row in table.head(MOST_LAYERS).to_dict("records"):
        figures = [f"{row['device_batch']:.4g}", f"{row['effective_batch']:.3g}", f"{row['spread']:.3g}"]
        rows.append([row["layer"], _condition_cells(c, row, False)[0], *figures, "yes" if row["needs"] else "no need"])
    if (more := len(table) - MOST_LAYERS) > 0:
        rows.append([f"and {more} more", "", "", "", "", ""])
    return _table(["layer", _axis(c), "device batch", "worth", "spread", "needs sharing"], rows)


def _expected(c: Comparison) -> Table:
    columns = ["what", "condition", "published", "ours", "agrees"]
    return _table(columns, c.expected[columns].values.tolist())


def _axis(c: Comparison) -> str:
    """The head of the column of conditions."""
    return c.axis.rpartition(".")[2] or "condition"


def _condition_cells(c: Comparison, row: dict[str, Any], several: bool) -> list[str]:
    """The condition, or only its number if the head names the axis; and how the runs ran, if that varies."""
    return [row["condition"].partition("=")[2] if c.axis else row["condition"], row["how"] if several else ""]
