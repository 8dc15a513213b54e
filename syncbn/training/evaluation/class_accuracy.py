"""Writes what the data are (``data.json``) and the accuracy of each class in the test (``classes.csv``)."""

import csv
import io
import json
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

from syncbn.training.atomic_write import replacing

WORST = 3  # classes that the printed summary names


def write_data(run_dir: Path, datamodule: Any) -> None:
    """Write the names of the classes, their training images, and the normalization, if the data module knows them.

    A user's data module may have no ``about``; then nothing is written.
    """
    about = getattr(datamodule, "about", None)
    if callable(about):
        text = json.dumps(about(), indent=2)
        with replacing(run_dir / "data.json") as draft:
            draft.write_text(text + "\n", encoding="utf-8")


def write_classes(run_dir: Path, module: Any, datamodule: Any) -> dict[str, float]:
    """Write the table of the test by class, and return the accuracy of each class for ``result.json``.

    Returns:
        Accuracies by the names of the classes, without those that have no test image; empty if the data module names
        no classes or the module has no ``class_accuracy``.
    """
    names: Sequence[str] = getattr(datamodule, "classes", None) or ()
    accuracy: Sequence[tuple[int, float]] = getattr(module, "class_accuracy", None) or ()
    if not names or len(names) != len(accuracy):
        return {}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("class", "samples", "accuracy"))
    rows.writerows((name, count, share) for name, (count, share) in zip(names, accuracy, strict=True))
    with replacing(run_dir / "classes.csv") as draft:
        # A name that is no UTF-8 is kept as it is in the file system.
        draft.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")
    return {name: share for name, (_, share) in zip(names, accuracy, strict=True) if not isnan(share)}


def worst(classes: dict[str, float]) -> str:
    """The classes with the lowest accuracies, for the printed summary."""
    ordered = sorted(classes.items(), key=lambda each: each[1])
    shown = ", ".join(f"{name} {100 * share:.1f} %" for name, share in ordered[:WORST])
    return f"{shown}; classes.csv has all {len(classes)}" if len(classes) > WORST else shown
