"""Draws ``mistakes.png``: the test images with the highest loss, with their true and their predicted class."""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from syncbn.training.evaluation.prediction_record import Mistakes
from syncbn.training.plots import figure
from syncbn.training.plots.figure import MUTED, RED, Margins, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE = "mistakes.png"
COLUMNS, SIDE = 6, 1.35
WIDTH, HEIGHT = SIDE + 0.25, SIDE + 0.55  # inches of an image with its margins and its text


def draw(run_dir: Path, mistakes: Mistakes, names: Sequence[str], normalization: "Normalization", title: str) -> None:
    """Draw the images, worst first, each with true class, predicted class, and the probability of that."""
    figure.attempt(FILE, lambda: _draw(run_dir / FILE, mistakes, names, normalization, title))


class Normalization:
    """What undoes the normalization of a data module's images.

    Args:
        datamodule: its attributes ``mean`` and ``std`` are used, if they are numbers per channel.
    """

    def __init__(self, datamodule: Any) -> None:
        self.mean, self.std = _numbers(datamodule, "mean"), _numbers(datamodule, "std")

    def undo(self, image: Tensor) -> Tensor:
        """An image ``(C, H, W)`` with values in [0, 1]. Without mean and std, values outside are scaled into it."""
        if self.mean is not None and self.std is not None and len(self.mean) == len(self.std) == len(image):
            return (image * self.std[:, None, None] + self.mean[:, None, None]).clamp(0, 1)
        image = image.nan_to_num(0, 0, 0)
        low, high = float(image.min()), float(image.max())
        return image if low >= 0 and high <= 1 else (image - low) / max(high - low, 1e-12)


def _numbers(datamodule: Any, name: str) -> Tensor | None:
    values = getattr(datamodule, name, None)
    try:
        found = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if found.dim() == 1 else None


def _draw(path: Path, mistakes: Mistakes, names: Sequence[str], normalization: Normalization, title: str) -> None:
    number = len(mistakes.losses)
    rows = ceil(number / COLUMNS)
    with figure.style():
        picture, (axes,) = figure.new(COLUMNS * WIDTH, rows * HEIGHT, margins=Margins(0.2, 0.0, 0.6, 0.1))
        axes.set(xlim=(0, COLUMNS * WIDTH), ylim=(rows * HEIGHT, 0))
        axes.set_axis_off()
        for at in range(number):
            left, top = at % COLUMNS * WIDTH, at // COLUMNS * HEIGHT + HEIGHT - SIDE - 0.1
            _draw_image(axes, normalization.undo(mistakes.images[at]).movedim(0, -1), left, top)
            true, predicted = (names[int(each[at])] for each in (mistakes.true, mistakes.predicted))
            axes.text(left, top - 0.22, shown(true, 20), fontsize=8)
            about = f"→ {shown(predicted, 14)} ({100 * float(mistakes.probabilities[at]):.0f} %)"
            axes.text(left, top - 0.05, about, fontsize=8, color=RED)
        figure.title(picture, title)
        note = "highest loss first: true class, then → the predicted class and its probability"
        left, top = 0.15 / picture.get_figwidth(), 1 - 0.36 / picture.get_figheight()
        picture.text(left, top, note, fontsize=8, va="top", color=MUTED)
        figure.save(picture, path)


def _draw_image(axes: "Axes", image: Tensor, left: float, top: float) -> None:
    """An image ``(H, W, C)`` in a square of ``SIDE`` inches, in its own proportions."""
    height, width = (SIDE * number / max(image.shape[:2]) for number in image.shape[:2])
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(
        (image[..., 0] if image.shape[-1] == 1 else image).numpy(),
        extent=(left, left + width, top + height, top),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest" if len(image) < 100 else "antialiased",
        aspect="auto",
    )
    axes.set(xlim=limits[0], ylim=limits[1])  # imshow changes them
