"""Notes on the compared runs: settings that differ, settings that are constant, and reasons for doubt."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from syncbn.study.compare.layout import Layout
from syncbn.study.compare.pairs import Pairs, Placed
from syncbn.study.compare.runs import labels
from syncbn.study.compare.runs.run_reader import Run
from syncbn.study.compare.runs.settings import PLACE, is_on_gpu

PACKAGES = ("syncbn", "torch", "lightning", "numpy")
SHOWN = ("data", "model", "norm", "module", "optimizer", "scheduler", "trainer", "devices", "mode", "adapt")
FEW_PAIRS = 5
UNKNOWN = "not known"
# Settings in which tests of one checkpoint may differ.
OF_TESTS = ("adapt", "data.corruption", "data.severity", "data.batch_size", "data.global_batch_size", "devices", *PLACE)
# Settings that every run has, and places on a machine. A reader does not need them, so the list of constant settings
# omits them.
QUIET = (
    "root",
    "_partial_",
    "shuffle",
    "deterministic",
    "num_sanity_val_steps",
    "check_val_every_n_epoch",
    "in_features",
)


def differs(pairs: Pairs, layout: Layout) -> list[str]:
    """One line for each setting of the factor that varies between sides, and one if the normalization batch varies."""
    used = [p for p in pairs.placed if p.used]
    sides = [side for side in layout.sides if any(p.side == side for p in used)]
    rows = [layout.side_rows[side] for side in sides]
    lines = [f"{name}: {' / '.join(_text_or_dash(row.get(name)) for row in rows)}" for name in labels.varying(rows)]
    batches = [_batches([p for p in used if p.side == side], layout) for side in sides]
    if len({*batches}) > 1:
        lines.append(f"samples that share statistics: {' / '.join(batches)}")
    return lines


def constant(pairs: Pairs, layout: Layout) -> list[str]:
    """Lines on the paired runs: shared settings by group, settings that follow the condition, seeds, and versions."""
    used = [p for p in pairs.placed if p.used]
    names = [condition for condition in layout.conditions if any(p.condition == condition for p in used)]
    rows = [layout.condition_rows[name] for name in names]
    varying = labels.varying(rows)
    same = {name: value for name, value in rows[0].items() if name not in varying}
    lines = [line for group in SHOWN if (line := _group(group, same))]
    for name in varying:
        if name not in layout.named and name.split(".")[0] in SHOWN:
            values = (
                f"{_text_or_dash(row.get(name))} at {condition}" for row, condition in zip(rows, names, strict=True)
            )
            lines.append(f"{name}: {', '.join(values)}")
    lines.append(f"seeds: {', '.join(map(str, sorted({p.seed for p in used})))}")
    shared = {name: versions for name, versions in _versions([p.run for p in used]).items() if len(versions) == 1}
    lines.append("versions: " + ", ".join(f"{name} {next(iter(versions))}" for name, versions in shared.items()))
    return lines


def versions(used: Sequence[Run]) -> list[str]:
    """Warnings about runs with different package versions, different device types, or uncommitted code changes."""
    lines = []
    for name, by_version in _versions(used).items():
        if len(by_version) > 1:
            counts = ", ".join(f"{version} ({count} runs)" for version, count in by_version.items())
            lines.append(f"the runs were not made with the same {name}: {counts}")
    kinds = _counts("GPUs" if is_on_gpu(run) else "the CPU" for run in used)
    if len(kinds) > 1:
        lines.append(
            "some pairs ran on GPUs, others on the CPU: " + ", ".join(f"{k} ({n} runs)" for k, n in kinds.items())
        )
    dirty = [run for run in used if (run.about.get("git") or {}).get("dirty")]
    if dirty:
        lines.append(f"{len(dirty)} of {len(used)} runs were made from code with changes that are in no commit")
    return lines


def unusable(placed: Sequence[Placed]) -> list[str]:
    """A line for each kind of trouble: one run with its path, or the number of runs of a side, and where they are."""
    kinds: dict[tuple[str, str], list[Placed]] = {}
    for each in placed:
        kinds.setdefault((each.side, re.sub(r"\d+(\.\d+)?", "#", each.why)), []).append(each)
    return [_unusable(alike) for alike in kinds.values()]


def _unusable(alike: Sequence[Placed]) -> str:
    first, known = alike[0], [p.run.seed for p in alike if p.run.seed is not None]
    if len(alike) == 1:
        words = ", ".join(filter(None, [first.side, first.condition, f"seed {known[0]}" if known else ""]))
        return f"{first.path}{f' ({words})' if first.side else ''}: {first.why}"
    where = labels.at(list(dict.fromkeys(p.condition for p in alike)))
    at = f" at {where}" if where else ""
    seeds = f" (seeds {', '.join(map(str, sorted(set(known))))})" if known else ""
    more = ", and others like it" if len({p.why for p in alike}) > 1 else ""
    return f"{len(alike)} runs{f' of {first.side}' if first.side else ''}{at}{seeds}: {first.why}{more}"


def checkpoints(pairs: Pairs, layout: Layout) -> list[str]:
    """A warning if paired tests use different checkpoints although the factor affects only the test."""
    if not all(labels.is_in(name, OF_TESTS) for name in layout.factor):
        return []
    both = [[each.run.about.get("tests") for each in two] for cell in pairs.cells.values() for two in cell]
    other = [two for two in both if two[0] != two[1]]
    if not other:
        return []
    one, two = (_text_or_dash(each) for each in other[0])
    return [
        f"in {len(other)} of {len(both)} pairs the tests are of two checkpoints ({one}, {two}), so they differ in more "
        f"than {','.join(layout.factor)}; test the same ones on all sides"
    ]


def few(effects: pd.DataFrame) -> list[str]:
    """A warning if a test has fewer than ``FEW_PAIRS`` pairs."""
    rows = effects[effects["n"] < FEW_PAIRS]
    if rows.empty:
        return []
    least = int(rows["n"].min())
    return [
        f"few pairs (at least {least}, and fewer than {FEW_PAIRS} in {len(rows)} of {len(effects)} rows): the "
        "intervals are wide and assume normally distributed differences; use 8 seeds or more"
    ]


def _versions(used: Sequence[Run]) -> dict[str, dict[str, int]]:
    """The number of runs by version, for each package and for the git commit."""
    found = {name: _counts((run.about.get("versions") or {}).get(name) or UNKNOWN for run in used) for name in PACKAGES}
    found["git commit"] = _counts(str((run.about.get("git") or {}).get("commit") or UNKNOWN)[:12] for run in used)
    return {name: counts for name, counts in found.items() if {*counts} != {UNKNOWN}}


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _group(group: str, same: dict[str, Any]) -> str:
    """``model: MLP, depth=4, width=64``; "" if no setting of the group is the same in all runs."""
    mine = {name: value for name, value in same.items() if labels.is_in(name, [group])}
    if group in mine:
        return f"{group}: {labels.text(mine[group])}"
    words = [labels.text(value).rpartition(".")[2] for name, value in mine.items() if name.endswith("._target_")]
    for name, value in mine.items():
        leaf = name.removeprefix(f"{group}.")
        if leaf.rpartition(".")[2] not in ("_target_", *QUIET) and value not in (False, ""):
            words.append(labels.assignment(leaf, value))
    return f"{group}: {', '.join(words)}" if words else ""


def _batches(of: Sequence[Placed], layout: Layout) -> str:
    """The distinct normalization batches, in the order of the conditions: ``4, 8, 16``."""
    by_condition = {p.condition: p.run.about.get("normalization_batch") for p in of}
    values = [by_condition[condition] for condition in layout.conditions if condition in by_condition]
    return ", ".join(dict.fromkeys(map(_text_or_dash, values)))


def _text_or_dash(value: Any) -> str:
    return "—" if value is None else labels.text(value)
