"""Small folders of images, and loaders of a rank without a process group."""

from pathlib import Path

import numpy as np
from PIL import Image


def pictures(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 12), seed: int = 0, colour=True) -> Path:
    """Images of noise below ``root``, each class brighter than the one before; names may hold a slash."""
    noise = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (*size, 3) if colour else size
            pixels = noise.integers(20 * (label % 5), 20 * (label % 5) + 120, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root
