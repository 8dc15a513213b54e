"""Writes what a test of a classification shows: ``confusion.csv``, ``confusion.png`` and ``mistakes.png``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from syncbn.training.evaluation.prediction_record import PredictionRecord
from syncbn.training.plots import confusion, mistakes


def write_test(run_dir: Path, record: PredictionRecord, datamodule: Any) -> None:
    """Write the files of a test, on rank 0. Nothing is written if the test recorded no predictions.

    Args:
        run_dir: the run directory; files of an earlier attempt are replaced or removed.
        record: of the test.
        datamodule: names the classes (``classes``) and has ``mean`` and ``std``, if it knows them.
    """
    for file in ("confusion.csv", "confusion.png", mistakes.FILE):
        (run_dir / file).unlink(missing_ok=True)
    if record.pairs is None or not len(record.pairs):
        return
    names, found = _names(datamodule, record.classes), confusion.cells(record.pairs)
    wrong = sum(each.samples for each in found if each.true != each.predicted)
    title = f"test of {run_dir.name}: {wrong:,} of {len(record.pairs):,} samples are predicted wrongly"
    confusion.write_table(run_dir, found, names)
    confusion.draw(run_dir, found, names, title)
    if record.mistakes is not None:
        normalization = mistakes.Normalization(datamodule)
        mistakes.draw(run_dir, record.mistakes, names, normalization, title)


def write_validation(run_dir: Path, matrix: Tensor, datamodule: Any, *, picture: bool) -> None:
    """Write the confusion matrix of the last validation: ``confusion-val.csv``, and ``confusion-val.png`` if asked."""
    names, found = _names(datamodule, len(matrix)), confusion.cells(confusion.pairs_of(matrix))
    confusion.write_table(run_dir, found, names, "confusion-val.csv")
    if picture:
        title = f"last validation of {run_dir.name}: {int(matrix.sum()):,} samples"
        confusion.draw(run_dir, found, names, title, "confusion-val.png")


def _names(datamodule: Any, number: int) -> list[str]:
    """The names of the classes; their numbers if the data module does not name as many."""
    names: Sequence[Any] = getattr(datamodule, "classes", None) or ()
    return [str(each) for each in names] if len(names) == number else [str(each) for each in range(number)]
