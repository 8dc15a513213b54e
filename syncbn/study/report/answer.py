"""The answer of a comparison: a sentence in plain words, and a line on the cost."""

from itertools import groupby

import pandas as pd

from syncbn.study.compare.comparison import Comparison
from syncbn.study.format import listed, span
from syncbn.study.report.plots.plot_labels import first_upper
from syncbn.study.report.tables import margin_text
from syncbn.study.report.wording import (
    Row,
    are_numbers,
    is_likely,
    is_small,
    main_side,
    mean_text,
    named,
    rows_of,
    where_text,
)

# Verdicts, in the order of the sentence. "Likely" is undecided with an interval that does not contain 0.
KINDS = ("lower", "higher", "no difference", "likely lower", "likely higher", "undecided", "too few pairs")

MOST_NUMBERS = 4  # at most so many conditions have their numbers in the sentence


def sentence(c: Comparison) -> str:
    """The answer in plain words: what the main side changes, and where.

    The main side is the first one named sync, or the last one if the sides are numbers of one setting.
    """
    if are_numbers(c) and len(c.conditions) == 1 and len(c.effects):
        return _sentence_on_values(c)
    side = main_side(c)
    rows = rows_of(c, side)
    if not rows:
        return f"{named(c, side)} could not be compared with {named(c, c.baseline)}."
    kinds = [(kind, list(those)) for kind, those in groupby(sorted(rows, key=_kind), _kind)]
    clauses = [_clause(c, side, kind, those, first=not at) for at, (kind, those) in enumerate(kinds)]
    text = f"{'; '.join(clauses)}."
    return text if "=" in text.split()[0] else first_upper(text)  # a setting stays as it is typed


def cost(c: Comparison) -> str:
    """One line: the time per step of each side relative to the baseline."""
    known = c.cost[(c.cost.side != c.baseline) & c.cost.ratio.notna()]
    if known.empty:
        return "Time per step: not measured, because no paired runs had a process for each device."
    ways, conditions = list(dict.fromkeys(known.how)), list(dict.fromkeys(known.condition))
    is_range = known.side.duplicated().any()
    over = "conditions" if len(conditions) > 1 else "ways of running"
    place = f"the range over {over}" if is_range else where_text(c, conditions).removesuffix(", ")
    where = ", ".join(filter(None, [listed(ways), place]))
    sides = [(side, known[known.side == side]) for side in c.sides if (known.side == side).any()]
    parts = [f"{named(c, side)} {_ratio(of_one)}" for side, of_one in sides]
    pairs = span(str(int(known.pairs.min())), str(int(known.pairs.max())))
    runs = f"{pairs} {'pair' if pairs == '1' else 'pairs'} of runs for each"
    spread = ", in brackets the least and the greatest" if not is_range and known.pairs.max() > 1 else ""
    return f"Time per step relative to {named(c, c.baseline)} ({where}; {runs}{spread}): {', '.join(parts)}."


def brief_cost(c: Comparison) -> str:
    """The time per step of the main side, in a few words; "" if it was not measured."""
    side = main_side(c)
    known = c.cost[(c.cost.side == side) & c.cost.ratio.notna()]
    return "" if known.empty else f"A step takes {_ratio(known)} as long as with {named(c, c.baseline)}."


def _sentence_on_values(c: Comparison) -> str:
    """``norm.group 2 and 4 instead of 1 lower the test error from 18.5 to 2.28 and 2.08 %.``"""
    rows = [row for side in sorted(c.sides, key=float) for row in rows_of(c, side)]
    clauses: list[str] = []
    for kind, those in groupby(sorted(rows, key=_kind), _kind):
        alike = list(those)
        values, many = listed([row["side"] for row in alike]), "" if len(alike) > 1 else "s"
        who = values if clauses else f"{c.factor} {values} instead of {c.baseline}"
        if KINDS[kind] in ("lower", "higher"):
            verb = ("lower" if KINDS[kind] == "lower" else "raise") + many
            after = listed([mean_text(c, row["condition"], row["side"], row["how"]) for row in alike])
            before = mean_text(c, alike[0]["condition"], c.baseline, alike[0]["how"])
            clauses.append(f"{who} {verb} the {c.metric.label} from {before} to {after} {c.metric.unit}".rstrip())
        elif KINDS[kind] == "no difference":
            clauses.append(f"{who} make{many} no difference beyond {margin_text(c)}")
        elif KINDS[kind].startswith("likely"):
            word = KINDS[kind].removeprefix("likely ")
            clauses.append(f"with {who} a {word} {c.metric.label} is likely, but not shown")
        else:
            clauses.append(f"{who} {'are' if len(alike) > 1 else 'is'} undecided")
    return f"{'; '.join(clauses)}."


def _kind(row: Row) -> int:
    """The index of the verdict in ``KINDS``."""
    likely = f"likely {'lower' if row['difference'] < 0 else 'higher'}"
    return KINDS.index(likely if is_likely(row) else row["verdict"])


def _clause(c: Comparison, side: str, kind: int, rows: list[Row], *, first: bool) -> str:
    """The part of the sentence on the conditions with one verdict. Only the first one names side and unit."""
    where, it = where_text(c, [row["condition"] for row in rows], first), named(c, side) if first else "it"
    verb = {"lower": "lowers", "higher": "raises"}.get(KINDS[kind])
    if KINDS[kind] == "no difference":
        return f"{where}{it} makes no difference beyond {margin_text(c)}"
    if KINDS[kind].startswith("likely"):
        with_it = f" {c.metric.label} with {it}" if first else f" {c.metric.label}"
        return f"{where}a {KINDS[kind].removeprefix('likely ')}{with_it} is likely, but not shown"
    if not verb:
        few = " (too few pairs of runs)" if KINDS[kind] == "too few pairs" else ""
        return f"{where}it is undecided{f' whether {it} makes a difference' if first else ''}{few}"
    small = f" (by less than {margin_text(c)})" if all(is_small(c, row) for row in rows) else ""
    if len(rows) > MOST_NUMBERS:
        sizes = sorted(abs(row["difference"]) for row in rows)
        by = span(f"{sizes[0]:.2g}", f"{sizes[-1]:.2g}")
        return f"{where}{it} {verb} the {c.metric.label} by {by} {c.metric.difference_unit}".rstrip() + small
    before, after = (
        listed([mean_text(c, row["condition"], each, row["how"]) for row in rows]) for each in (c.baseline, side)
    )
    return f"{where}{it} {verb} the {c.metric.label} from {before} to {after} {c.metric.unit}".rstrip() + small


def _ratio(rows: pd.DataFrame) -> str:
    """``0.87× (0.83 to 0.89)``; the range over conditions if there are several."""
    if len(rows) == 1:
        row = rows.iloc[0]
        return f"{row.ratio:.2f}×" + (f" ({row.ratio_low:.2f} to {row.ratio_high:.2f})" if row.pairs > 1 else "")
    return f"{span(f'{rows.ratio.min():.2f}', f'{rows.ratio.max():.2f}')}×"
