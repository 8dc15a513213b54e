"""``comparison_page``: the sections of a comparison's page, in order."""

from collections.abc import Sequence
from pathlib import Path

from syncbn.study.compare.comparison import Comparison
from syncbn.study.compare.paired_tests import is_within
from syncbn.study.format import interval, plural, signed, times
from syncbn.study.report import blocks, tables
from syncbn.study.report.blocks import Block, Group, bullets, escape, terms
from syncbn.study.report.plot_style import Plot


def comparison_page(c: Comparison, drawn: Sequence[Plot], directory: Path, place: str = "") -> list[Block | Group]:
    """The blocks of a page.

    The files of the plots ``drawn`` must exist in ``directory``. ``place`` is this directory relative to the page: "",
    or "NAME/" on a page of several comparisons.
    """
    part = _Part(c, drawn, directory, place)
    return [
        *part.head(),
        part.runs(),
        part.answer(),
        part.section("Seed by seed, and epoch by epoch", part.figures("seeds", "curves")),
        part.section("Cost", part.figures("cost"), *part.table("cost"), *part.note("cost", tables.COST_NOTE)),
        part.section("Layers", *part.suggestion(), part.figures("layers"), *part.table("layers")),
        part.section(
            "Expected and published figures",
            *part.table("expected", "No published or expected figure was given for this comparison."),
        ),
        part.confirmations(),
        part.every_run(),
        part.section("How to make this page again", blocks.command(c.command), blocks.computed()),
    ]


class _Part:
    """Builds the sections of one comparison."""

    def __init__(self, c: Comparison, drawn: Sequence[Plot], directory: Path, place: str) -> None:
        self._c, self._drawn, self._directory, self._place = c, drawn, directory, place
        self._prefix, self._deeper = place.replace("/", "-"), "#" if place else ""
        self._tables = tables.build(c)

    def section(self, heading: str, *inside: Block | Group) -> Group:
        return Group([Block(f"{self._deeper}## {heading}"), *inside])

    def table(self, name: str, instead: str = "") -> list[Block]:
        return blocks.table(self._tables.get(name), self._place, self._prefix, instead)

    def note(self, table: str, text: str) -> list[Block]:
        """A note below a table; nothing if there is no table."""
        return [Block(escape(text), "notes")] if table in self._tables else []

    def figures(self, *names: str) -> Group:
        shown = [plot for plot in self._drawn if plot.name.startswith(names)]
        figures = [blocks.figure(plot, self._directory, self._place, self._prefix) for plot in shown]
        return Group(figures, "div", "plots")

    def head(self) -> list[Block | Group]:
        verdict = "verdict long" if len(self._c.verdict) > 300 else "verdict"
        return [
            Block(f"{self._deeper}# {escape(self._c.title)}", "part" if self._deeper else ""),
            Block(escape(self._c.question), "question"),
            Block(f"**{escape(self._c.verdict)}**" if self._c.verdict else "", verdict),
            terms(key_figures(self._c), "key", colon=""),
            blocks.problems(self._c.problems, self._deeper, self._prefix),
        ]

    def runs(self) -> Group:
        facts = {
            "What differs between the sides": self._c.differs,
            "What all runs share": self._c.constant,
            "Runs": tables.counted(self._c),
        }
        lists = [Group([Block(f"{title}:\n\n{bullets(lines)}")], "div") for title, lines in facts.items() if lines]
        return self.section("What was run", Group(lists, "div", "facts"))

    def answer(self) -> Group:
        inside: list[Block | Group] = [self.figures("metric", "effects")]
        if "effects" in self._tables:
            heading = f"Differences from {escape(self._c.baseline)}, between runs of the same seed"
            inside += [Block(f"{self._deeper}### {heading}"), *self.table("effects")]
            inside.append(terms(tables.effects_notes(self._c), "notes"))
        if "means" in self._tables:
            inside += [Block(f"{self._deeper}### Means of each side"), *self.table("means")]
            inside += self.note("means", tables.MEANS_NOTE)
        return self.section("The answer", *inside)

    def suggestion(self) -> list[Block]:
        return [Block(f"**Suggestion:** {escape(self._c.suggestion)}")] if self._c.suggestion else []

    def confirmations(self) -> Group:
        what = "Runs in one process that stands for several devices, repeated with a process for each device."
        return self.section(
            "One process against several",
            Block(what if "confirmations" in self._tables else "", only="html"),
            *self.table("confirmations", "No settings ran both in one process and with a process for each device."),
        )

    def every_run(self) -> Group:
        table: list[Block | Group] = list(self.table("runs", "No run was looked at."))
        if "runs" in self._tables:
            summary = f"{len(self._tables['runs'].rows)} runs, with those that are in no pair"
            table = [Group(table, "details", summary=summary)]
        return self.section("Every run", *table)


def key_figures(comparison: Comparison) -> list[tuple[str, str]]:
    """The key figures beside the verdict: each a number with its description."""
    unit, effects = comparison.metric.difference_unit, comparison.effects
    figures = []
    if effects.difference.notna().any():
        row = effects.loc[effects.difference.astype(float).abs().idxmax()]
        what = f"{row.side} minus {comparison.baseline}{f' at {row.condition}' if row.condition else ''}"
        range_ = interval(row.low, row.high, unit, sign=True)
        meaning = f"{comparison.metric.label}, {what}: the largest difference (95 %: {range_})"
        figures.append((f"{signed(row.difference, unit)} {unit}".strip(), meaning))
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
