"""A comparison in the terminal: tables that fit into 100 columns; the answer; and last what casts doubt."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncbn.study.comparison import Comparison
from syncbn.study.wording import p_value, signed

WIDTH = 100  # where the output is a file or a pipe
MOST_LAYERS = 8
STYLES = {
    "lower": "bold green",
    "higher": "bold green",
    "no difference": "green",
    "undecided": "yellow",
    "no": "bold red",
}


def show(comparison: Comparison, console: Console) -> None:
    """Prints it. What does not fit into a column goes on in its next line, whole."""
    if not console.is_terminal:
        console.width = WIDTH
    c, unit = comparison, f" {comparison.metric.unit}" if comparison.metric.unit else ""
    finished = int((c.runs["status"] == "finished").sum())
    console.print(Text(c.title, "bold"))
    counts = f"{len(c.runs)} runs, {finished} of them finished, {int(c.runs['used'].sum())} of them in pairs"
    for line in [*([c.question] if c.question else []), counts, *c.differs]:
        console.print(Text(line))
    several = c.effects["how"].nunique() > 1
    _print(console, f"{c.metric.label}{unit}: mean ± standard deviation over seeds", _means(c, several))
    points = f" in {c.metric.difference_unit}" if c.metric.difference_unit else ""
    _print(console, f"difference to {c.baseline}{points}, over pairs of one seed", _effects(c, several))
    console.print(
        Text(
            f"p: paired t test, by Holm for all rows; p same: that the difference is ±{c.margin:.3g} or more (TOST); "
            f"both at {c.alpha:g}",
            "dim",
        )
    )
    _print(console, "time of a step, where every device is a process", _cost(c))
    _print(console, "layers, those that need shared statistics first", _layers(c))
    if c.suggestion:
        console.print(Text(c.suggestion))
    _print(console, "published or expected figures", _expected(c))
    if not c.confirmations.empty:
        most = c.confirmations["difference"].abs().max()
        console.print(
            Text(
                f"\n{len(c.confirmations)} runs in one process were confirmed by processes: at most {most:.3g} "
                f"{c.metric.difference_unit} apart".rstrip()
            )
        )
    console.print(Text(f"\n{c.verdict}", "bold"))
    if c.problems:
        console.print(Text(f"\nKNOW BEFORE YOU BELIEVE IT ({len(c.problems)}):", "bold red"))
        for line in c.problems:
            console.print(Text(f"! {line}", "red"))


def _print(console: Console, title: str, table: Table) -> None:
    if table.row_count:
        console.print(Text(f"\n{title}"))
        console.print(table)


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], folded: Sequence[str] = ("", "side", "what")
) -> Table:
    """Words to the left, folded; numbers to the right, never cut. A column in which nothing is said is left out."""
    listed = [list(row) for row in rows]
    kept = [place for place, _ in enumerate(columns) if any(str(row[place]) for row in listed)]
    table = Table(box=box.HORIZONTALS, header_style="bold", padding=(0, 1), pad_edge=False)
    for place in kept:
        is_word = columns[place] in folded
        table.add_column(
            Text(columns[place]),
            justify="left" if is_word else "right",
            no_wrap=not is_word,
            overflow="fold" if is_word else "ellipsis",
            min_width=None if is_word else max(len(str(row[place])) for row in listed),
        )
    for row in listed:
        table.add_row(*(Text(str(row[place]), STYLES.get(str(row[place]), "")) for place in kept))
    return table


def _means(c: Comparison, several: bool) -> Table:
    """A row for a condition, a column for a side."""
    rows = []
    for (condition, how), here in _by(c.means, "condition", "how" if several else None):
        of = {row["side"]: row for row in here.to_dict("records")}
        cells = [_mean(of[side]) if side in of else "—" for side in c.sides]
        rows.append([_where(condition, how), *cells])
    return _table(["", *c.sides], rows)


def _mean(row: dict[str, Any]) -> str:
    spread = "" if math.isnan(row["sd"]) else f" ± {row['sd']:.2g}"
    return f"{row['mean']:.4g}{spread} ({row['n']})"


def _effects(c: Comparison, several: bool) -> Table:
    rows = []
    for row in c.effects.to_dict("records"):
        interval = "—" if math.isnan(row["low"]) else f"[{signed(row['low'])}, {signed(row['high'])}]"
        where = _where(row["condition"], row["how"] if several else "")
        figures = [row["n"], signed(row["difference"]), interval, p_value(row["p_holm"]), p_value(row["p_tost"])]
        rows.append([where, row["side"], *figures, row["verdict"]])
    columns = ["", "side", "pairs", "difference", "95 % interval", "p", "p same", "verdict"]
    return _table(columns, rows)


def _cost(c: Comparison) -> Table:
    rows = []
    for row in c.cost.to_dict("records"):
        ratio = "—" if math.isnan(row["ratio"]) else f"{row['ratio']:.2f}"
        spread = "" if row["side"] == c.baseline else f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        share = "" if math.isnan(row["collectives"]) else f"{100 * row['collectives']:.0f} %"
        time = [f"{1e3 * row['seconds_per_step']:.3g} ms", f"{row['images_per_second']:,.0f}"]
        rows.append(
            [_where(row["condition"], row["how"]), row["side"], *time, ratio, spread.replace("nan to nan", "—"), share]
        )
    return _table(["", "side", "step", "images/s", "ratio", "over seeds", "in messages"], rows)


def _layers(c: Comparison) -> Table:
    rows = []
    for row in c.layers.head(MOST_LAYERS).to_dict("records"):
        figures = [f"{row['device_batch']:.4g}", f"{row['effective_batch']:.3g}", f"{row['spread']:.3g}"]
        rows.append(
            [f"{row['layer']}", _where(row["condition"], row["side"]), *figures, "yes" if row["needs"] else "no need"]
        )
    more = len(c.layers) - MOST_LAYERS
    if more > 0:
        rows.append([f"and {more} more", "", "", "", "", ""])
    columns = ["layer", "", "device batch", "worth", "spread", "needs sharing"]
    return _table(columns, rows, folded=["layer", ""])


def _expected(c: Comparison) -> Table:
    columns = ["what", "", "published", "ours", "agrees"]
    rows = [
        [row["what"], *(row[n] for n in ("condition", "published", "ours", "agrees"))]
        for row in c.expected.to_dict("records")
    ]
    return _table(columns, rows)


def _by(table: pd.DataFrame, first: str, second: str | None) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    keys = dict.fromkeys((row[first], row[second] if second else "") for row in table.to_dict("records"))
    return [
        ((one, two), table[(table[first] == one) & ((table[second] == two) if second else True)]) for one, two in keys
    ]


def _where(condition: str, how: str) -> str:
    return "; ".join(part for part in (condition, how) if part)
