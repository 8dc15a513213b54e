"""Draws images beside class masks: the true one, and predictions."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from syncbn.training.atomic_write import replacing
from syncbn.training.plots import figure
from syncbn.training.plots.figure import Margins, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE, GAP, HEAD = 1.0, 0.08, 0.28  # inches of an image, between images, and above them
TRUTH = "truth"


def write(path: Path, images: Any, masks: Mapping[str, Any]) -> None:
    """Write arrays as a compressed ``.npz``, which :func:`read` reads; equal arrays make equal files.

    Args:
        path: of the file.
        images: of shape ``(N, H, W)`` or ``(N, H, W, 3)``, uint8.
        masks: class of each pixel by name, shape ``(N, H, W)``, uint8; the first is the truth.
    """
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez_compressed(file, images=images, **{f"mask {name}": mask for name, mask in masks.items()})


def read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The images and the masks of a file that :func:`write` wrote.

    Raises:
        OSError, ValueError, KeyError: the file is missing or is no such file.
    """
    with np.load(path, allow_pickle=False) as found:
        masks = {name.removeprefix("mask "): found[name] for name in found.files if name != "images"}
        return found["images"], masks


def draw(images: Any, masks: Mapping[str, Any], title: str = "") -> "Figure":
    """A figure with a row of images and a row for each mask; classes have colours, and class 0 is the paper.

    Call it within :func:`syncbn.training.plots.figure.style`, or another style.
    """
    import matplotlib as mpl

    colours = mpl.colormaps["tab20"](np.arange(20))[:, :3]
    number, rows = len(images), {"image": images, **masks}
    wide, high = number * (SIDE + GAP), SIDE + GAP
    margins = Margins(1.15, 0.1, 0.5 if title else 0.1, 0.1)
    made, (axes,) = figure.new(wide, len(rows) * high, margins=margins)
    axes.set_axis_off()
    for row, (name, each) in enumerate(rows.items()):
        top = row * high
        axes.text(-0.1, top + SIDE / 2, shown(name, 16), ha="right", va="center", fontsize=9)
        for column in range(number):
            left = column * (SIDE + GAP)
            extent = (left, left + SIDE, top + SIDE, top)
            if row:
                classes = each[column].astype(int)
                pixels = np.where((classes > 0)[..., None], colours[(classes - 1) % 20], 0.93)
                axes.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto")
            else:
                axes.imshow(
                    each[column], extent=extent, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto"
                )
    axes.set(xlim=(0, wide), ylim=(len(rows) * high, 0))
    if title:
        figure.title(made, title)
    return made


def as_pixels(images: Any) -> Any:
    """Images ``(N, C, H, W)`` as uint8 of shape ``(N, H, W)`` or ``(N, H, W, 3)``, each scaled to its own range."""
    pixels = np.asarray(images, dtype=np.float32)
    low, high = (edge(pixels, axis=(1, 2, 3), keepdims=True) for edge in (np.min, np.max))
    pixels = (255 * (pixels - low) / np.maximum(high - low, 1e-12)).round().astype(np.uint8)
    return pixels[:, 0] if pixels.shape[1] != 3 else pixels.transpose(0, 2, 3, 1)
