"""Images of a study with their masks: the truth, and the predictions of several sides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from syncbn.study.report import blocks
from syncbn.study.report.blocks import Block
from syncbn.study.report.plots import plot_style
from syncbn.study.report.plots.plot_style import Plot
from syncbn.training.atomic_write import unlinked
from syncbn.training.plots import figure, masks
from syncbn.training.read_file import DamagedError

NAME, FILE = "examples", "examples.npz"


class Examples(NamedTuple):
    """Test images with masks.

    Attributes:
        images: uint8 of shape ``(N, H, W)`` or ``(N, H, W, 3)``.
        masks: classes of the pixels by name, uint8 of shape ``(N, H, W)``: the truth, then the predictions of sides.
    """

    images: Any
    masks: Mapping[str, Any]


def of_runs(directories: Mapping[str, Path]) -> Examples | None:
    """The examples of runs, by the name of the side; None if no run has saved any.

    The runs must have tested the same images.
    """
    found: Examples | None = None
    for side, directory in directories.items():
        try:
            images, rows = masks.read(directory / FILE)
        except (OSError, ValueError, KeyError):
            continue
        if found is None:
            found = Examples(images, {masks.TRUTH: rows[masks.TRUTH]})
        found = found._replace(masks={**found.masks, side: rows["prediction"]})
    return found


def read(directory: Path) -> Examples | None:
    """The examples of a page that was written in the directory; None if it has none."""
    path = directory / FILE
    try:
        return Examples(*masks.read(path)) if path.exists() else None
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(path, f"is damaged ({error})") from error


def write(examples: Examples | None, directory: Path) -> list[Block]:
    """Writes the arrays and ``plots/examples.png`` and ``.svg``, and returns the figure's block; removes older ones."""
    paths = [directory / FILE, *(directory / "plots" / f"{NAME}.{kind}" for kind in ("png", "svg"))]
    for path in paths:
        unlinked(path).unlink(missing_ok=True)
    if examples is None:
        return []
    unlinked(directory / "plots").mkdir(parents=True, exist_ok=True)
    masks.write(paths[0], examples.images, examples.masks)
    sides = " and ".join(name for name in examples.masks if name != masks.TRUTH)
    caption = (
        f"The first {len(examples.images)} test images, their true masks, and predictions with {sides}, of one seed."
    )
    with figure.style():
        plot = Plot(NAME, "Test images and predictions", caption, masks.draw(examples.images, examples.masks))
        plot_style.save([plot], directory / "plots")
    return [blocks.figure(plot, directory)]
