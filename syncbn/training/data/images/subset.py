"""Draws a part of the images of an archive, by class."""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from syncbn.training.errors import SettingError


def check(name: str, count: Any) -> None:
    """Refuse a number of images that is neither None nor a whole number of 1 or more.

    Raises:
        SettingError: on the setting ``data.NAME``.
    """
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise SettingError(f"data.{name}", count, "use a whole number, 1 or more, or null for all images")


def draw(labels: Sequence[int], count: int | None, seed: int, name: str) -> list[int]:
    """Draw images in the proportions of their classes, at least one of each.

    A smaller draw with the same seed is part of a larger one.

    Args:
        labels: the class of each image.
        count: how many images to draw; None for all.
        seed: seed of the draw.
        name: the setting of ``data`` that has ``count``, for the error.

    Returns:
        Indices into ``labels``, ascending.

    Raises:
        SettingError: more images than there are, or fewer than there are classes.
    """
    if count is None:
        return list(range(len(labels)))
    sizes = Counter(labels)
    if not len(sizes) <= count <= len(labels):
        hint = f"there are {len(labels)} images in {len(sizes)} classes; use {len(sizes)} to {len(labels)}, or null"
        raise SettingError(f"data.{name}", count, f"{hint} for all")
    places: list[tuple[bool, float, int, int]] = []
    drawn = Counter[int]()
    for index in sorted(range(len(labels)), key=lambda each: _place(seed, each)):
        label = labels[index]
        # The n-th of N images of a class comes when a share of (n - 1/2) / N of all images is drawn.
        places.append((drawn[label] > 0, (drawn[label] + 0.5) / sizes[label], label, index))
        drawn[label] += 1
    return sorted(index for *_, index in sorted(places)[:count])


def _place(seed: int, index: int) -> bytes:
    return blake2b(f"{seed}\0{index:08d}".encode(), digest_size=16).digest()
