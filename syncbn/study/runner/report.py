"""Writes the report of a study: one page with a comparison for each part and metric, and the page on its claim."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from syncbn.study.cells import Cell, is_chosen
from syncbn.study.claims import evaluate, expectations
from syncbn.study.claims.report import page
from syncbn.study.compare.compare import compare
from syncbn.study.compare.comparison import Comparison
from syncbn.study.report import answer, examples, wandb_run
from syncbn.study.report import expectations as expectation_blocks
from syncbn.study.report.examples import Examples
from syncbn.study.report.write import write_several
from syncbn.study.runner.load import Member
from syncbn.training.console import cell, print_line
from syncbn.training.errors import SettingError
from syncbn.training.loggers import chosen as chosen_loggers
from syncbn.training.run_directory import paths


def write(cfg: DictConfig, study: dict[str, Any], cells: Sequence[Cell], root: Path, command: str = "") -> None:
    """Compares the runs in the study's directory, prints the verdicts, and writes ``report/report.html`` there.

    If the study has a claim, its page is written to ``report/claim``. It comes first, because it needs no complete
    pairs, while a comparison without pairs is an error.

    Args:
        cfg: all settings. ``logger`` determines whether the report is also logged to W&B.
        study, cells, root: as in :class:`syncbn.study.runner.load.Member`.
        command: the command that repeats the runs and writes this page.

    Raises:
        SettingError: there are no runs to compare.
    """
    if study["claim"] is not None:
        write_claims(study, [Member(study, list(cells), root)], root / "report" / "claim", command)
    comparisons = {}
    for name, part in study["parts"].items():
        for metric, chosen in part.get("metrics", {"test/acc": {}}).items():
            # Some conditions and sides do not have every metric.
            mine = [cell for cell in cells if cell.part == name and is_chosen(cell.condition, cell.side, chosen)]
            there = [cell.directory for cell in mine if cell.directory.exists()]
            compared = replace(_compare(study, name, part, metric, there), command=command)
            comparisons[f"{name}-{metric.replace('/', '-')}"] = compared
    console = Console(soft_wrap=True, highlight=False)
    expected = expectations.answers(study, cells, root)
    if expected:
        console.print()
        console.print(cell(expectation_blocks.sentence(expected), "bold"))
        for effect in expectation_blocks.lines(expected):
            console.print(cell(effect))
    for each in comparisons.values():
        console.print()
        console.print(cell(each.title, "bold"))
        for line in [answer.sentence(each), answer.cost(each), *(f"! {problem}" for problem in each.problems)]:
            console.print(cell(line))
    path = write_several(
        study["title"],
        study["question"].strip(),
        comparisons,
        root / "report",
        expected=expected,
        shown=_examples(study, cells),
    )
    print_line()
    print_line(f"report: {paths.short(path)}")
    logger = cfg.logger
    if chosen_loggers.uses_wandb(logger):
        about = {"mode": str(logger.mode), "project": logger.project, "entity": logger.entity, "group": study["name"]}
        for name, each in comparisons.items():
            shutil.rmtree(root / "report" / name / "wandb", ignore_errors=True)  # from the previous report
            print_line(f"W&B: {wandb_run.log_to_wandb(each, root / 'report' / name, **about)}")


def write_claims(study: dict[str, Any], found: Sequence[Member], directory: Path, command: str) -> None:
    """Prints the verdicts on the claims of studies, and writes one page on them.

    ``study`` has the page's title and question: the settings of the only study, or of the study of studies.
    """
    listed = [evaluate.find(each.study, each.cells, each.root, command) for each in found]
    for line in page.lines(listed):
        print_line(line)
    path = page.write(listed, study["title"], study["question"].strip(), directory)
    print_line()
    print_line(f"claims: {paths.short(path)}")


def _examples(study: dict[str, Any], cells: Sequence[Cell]) -> Examples | None:
    """The images of the first part that asks for some, as the runs of its sides predict them."""
    for name, part in study["parts"].items():
        if asked := part.get("examples"):
            at = {(cell.part, cell.condition, cell.side, cell.seed): cell.directory for cell in reversed(cells)}
            condition = str(asked.get("condition", ""))
            runs = {side: at.get((name, condition, side, 0)) for side in map(str, asked["sides"])}
            return examples.of_runs({side: run for side, run in runs.items() if run})
    return None


def _compare(study: dict[str, Any], name: str, part: dict[str, Any], metric: str, paths: list[Path]) -> Comparison:
    try:
        return compare(
            paths,
            factor=part.get("factor", "norm"),
            baseline=part.get("baseline"),
            metric=metric,
            title=f"{part['title']}: {study['metrics'].get(metric, metric)}",
            question=part.get("question", ""),
            margin=part.get("margin"),
            sparse=bool(part.get("without")),
            expected=part.get("expected", ()),
        )
    except SettingError as error:
        raise SettingError(f"study.parts.{name}", hint=str(error)) from error
