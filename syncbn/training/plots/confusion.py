"""Writes ``confusion.csv`` and draws ``confusion.png``: which classes are taken for which."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from syncbn.training.atomic_write import replacing
from syncbn.training.plots import figure
from syncbn.training.plots.figure import BLUE, INK, MUTED, Margins, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CELLS = 20  # classes up to which the picture has a number in each cell
MOST_NAMES = 45  # classes up to which the axes have names
MOST_MAP = 200  # classes up to which there is a map
PAIRS = 25  # confused pairs that are listed


class Cell(NamedTuple):
    """Samples of one class that were predicted as one class."""

    true: int
    predicted: int
    samples: int
    share: float  # of the samples of the true class


def cells(pairs: Tensor) -> list[Cell]:
    """The cells of the confusion matrix that are not 0, by true and predicted class.

    Args:
        pairs: true and predicted class of each sample, ``(N, 2)``.
    """
    found, counts = torch.unique(pairs, dim=0, return_counts=True)
    samples = dict(zip(*(each.tolist() for each in torch.unique(pairs[:, 0], return_counts=True)), strict=True))
    listed = zip(found.tolist(), counts.tolist(), strict=True)
    return [Cell(true, predicted, n, n / samples[true]) for (true, predicted), n in listed]


def pairs_of(matrix: Tensor) -> Tensor:
    """True and predicted class of each sample that a confusion matrix counts."""
    places = matrix.nonzero()
    return places.repeat_interleave(matrix[places[:, 0], places[:, 1]].long(), 0)


def write_table(run_dir: Path, found: Sequence[Cell], names: Sequence[str], file: str = "confusion.csv") -> None:
    """Write one row for each cell that is not 0: true class, predicted class, samples, share of the true class."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("true", "predicted", "samples", "share"))
    rows.writerows((names[each.true], names[each.predicted], each.samples, each.share) for each in found)
    with replacing(run_dir / file) as draft:
        draft.write_text(text.getvalue(), encoding="utf-8", errors="surrogateescape")


def draw(run_dir: Path, found: Sequence[Cell], names: Sequence[str], title: str, file: str = "confusion.png") -> None:
    """Draw the confusion matrix: all cells of a few classes, a map and the most confused pairs of many."""
    figure.attempt(file, lambda: _draw(run_dir / file, found, names, title))


def _draw(path: Path, found: Sequence[Cell], names: Sequence[str], title: str) -> None:
    classes = len(names)
    panels: list[Callable[[Axes], None]] = []
    if classes <= MOST_MAP:
        panels.append(lambda axes: _draw_map(axes, found, names))
    if classes > MOST_CELLS:
        panels.append(lambda axes: _draw_pairs(axes, _most_confused(found), names))
    named, side = classes <= MOST_NAMES, min(max(0.42 * classes, 2.6), 6.2)
    margins = Margins(left=1.5 if named else 0.7, top=0.6, bottom=1.2 if named else 0.6, across=2.7)
    margins = margins if len(panels) > 1 or classes <= MOST_CELLS else margins._replace(left=2.5)
    with figure.style():
        picture, axes = figure.new(side, side, 1, len(panels), margins=margins)
        for draw_panel, place in zip(panels, axes, strict=True):
            draw_panel(place)
        figure.title(picture, title)
        figure.save(picture, path)


def _most_confused(found: Sequence[Cell]) -> list[Cell]:
    wrong = [each for each in found if each.true != each.predicted]
    return sorted(wrong, key=lambda each: (-each.samples, -each.share))[:PAIRS]


def _draw_map(axes: "Axes", found: Sequence[Cell], names: Sequence[str]) -> None:
    shares = torch.zeros(len(names), len(names))
    for each in found:
        shares[each.true, each.predicted] = each.share
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    axes.grid(visible=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(names) <= MOST_NAMES:
        places, labels = range(len(names)), [shown(name, 16) for name in names]
        size = 8 if len(names) <= MOST_CELLS else 6
        axes.set_xticks(places, labels, rotation=90 if len(max(labels, key=len)) > 2 else 0, fontsize=size)
        axes.set_yticks(places, labels, fontsize=size)
    if len(names) <= MOST_CELLS:
        for each in found:
            text = f"{each.samples}\n{100 * each.share:.0f} %"
            color = "white" if each.share > 0.5 else INK
            axes.text(each.predicted, each.true, text, ha="center", va="center", fontsize=6.5, color=color)


def _draw_pairs(axes: "Axes", listed: Sequence[Cell], names: Sequence[str]) -> None:
    axes.set_title(f"most confused: true → predicted{'' if listed else ' (none)'}")
    axes.grid(visible=False, axis="y")
    places = range(len(listed))
    axes.barh(places, [each.samples for each in listed], color=BLUE, height=0.6)
    labels = [f"{shown(names[each.true], 18)} → {shown(names[each.predicted], 18)}" for each in listed]
    axes.set_yticks(places, labels, fontsize=7.5, color=INK)
    for place, each in zip(places, listed, strict=True):
        text = f" {each.samples}  ({100 * each.share:.0f} %)"
        axes.text(each.samples, place, text, va="center", fontsize=7, color=MUTED)
    axes.set_ylim(max(len(listed), 8) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * max((each.samples for each in listed), default=1))
    axes.set_xlabel("samples (share of the true class)")
