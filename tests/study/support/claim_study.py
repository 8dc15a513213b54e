"""A study with a claim, and its run directories with known numbers, written without training."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from syncbn.study import cells
from syncbn.study.claims.evaluate import find
from syncbn.study.claims.result import Finding, Row

PLOT = {"kind": "conditions", "part": "one", "metric": "test/acc", "title": "Errors", "x": "rate", "y": "error, %"}
CASE = {"part": "one", "over": "0.1", "metric": "test/loss", "wants": "lower", "effect": "difference", "at_least": 1}
BASE = [10.0, 11.0, 9.0, 10.5, 12.0, 8.0, 10.2, 9.9]  # of eight seeds
LESS = [value - 3 - 0.1 * place for place, value in enumerate(BASE)]  # by 3 to 3.7
Numbers = Mapping[tuple[str, str, str], Mapping[int, Mapping[str, float]]]  # by part, condition and side; by seed


def study(cases: Mapping[str, Mapping[str, Any]] | None = None, *, seeds: int = 8, **claim: Any) -> dict[str, Any]:
    """A study with two parts, three conditions and four sides. ``cases`` and ``claim`` replace parts of its claim."""
    given = {name: CASE | dict(case) for name, case in (cases or {"plain": {}}).items()}
    about = {"number": 1, "text": "Lower loss", "article": "It lowers the loss.", "method": "It is tried."}
    norms = {"baseline": "none", "sides": ["local", "sync"]}
    sides = {name: [f"norm={name}"] for name in ("none", "local", "sync", "group_norm")}
    part = {"title": "A part", "conditions": {"0.1": [], "1": [], "10": []}, "sides": sides}
    return {
        "name": "made_up",
        "budget": "default",
        "seeds": None,
        "settings": [],
        "budgets": {"smoke": {"seeds": seeds}, "default": {"seeds": seeds}},
        "parts": {
            "one": part | {"budgets": {"smoke": {"conditions": [10]}}},
            "other": part | {"conditions": {"a": [], "b": []}},
        },
        "claim": {**about, **norms, "cases": given, "plots": [PLOT]} | claim,
    }


def write(directory: Path, status: str = "finished", **parts: Any) -> None:
    """Writes a run directory with the files that are read; ``result.json`` only if it has parts."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(
        f"seed: {directory.name}\ndata: {{}}\nnorm: {{}}\ntrainer: {{}}\n", encoding="utf-8"
    )
    (directory / "run.json").write_text(json.dumps({"status": status}), encoding="utf-8")
    if parts:
        (directory / "result.json").write_text(json.dumps(parts), encoding="utf-8")


def losses(root: Path, **by_side: Iterable[float]) -> Path:
    """Writes runs at the condition 0.1 of the first part, with these losses for the seeds 0, 1, ..."""
    return runs(root, {("one", "0.1", side): by_seed("test/loss", values) for side, values in by_side.items()})


def by_seed(metric: str, values: Iterable[float]) -> dict[int, dict[str, float]]:
    """A metric of the seeds 0, 1, ..."""
    return {seed: {metric: value} for seed, value in enumerate(values)}


def errors(root: Path, **by_side: Iterable[float]) -> Path:
    """As :func:`losses`, with test errors in percent."""
    accuracies = {side: [1 - error / 100 for error in of] for side, of in by_side.items()}
    return runs(root, {("one", "0.1", side): by_seed("test/acc", of) for side, of in accuracies.items()})


def runs(root: Path, numbers: Numbers) -> Path:
    """Writes runs with these numbers as test results."""
    for place, by_seed in numbers.items():
        for seed, test in by_seed.items():
            write(root.joinpath(*place, str(seed)), test=dict(test))
    return root


def found(root: Path, made: Mapping[str, Any]) -> Finding:
    return find(made, cells.cells(made, [], root), root, "python train.py +study=made_up")


def sync_row(root: Path, case: Mapping[str, Any], **changes: Any) -> Row:
    """The row of ``sync`` in a study with one case and one side."""
    return row(found(root, study({"plain": case}, sides=["sync"], **changes)), "plain", "sync")


def row(finding: Finding, case: str, side: str) -> Row:
    (one,) = [each for each in finding.rows if (each.case, each.side) == (case, side)]
    return one
