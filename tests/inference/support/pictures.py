"""An image file of a digit."""

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def a_seven(path: Path) -> Path:
    """Writes the first seven of scikit-learn's digits."""
    digits = load_digits()
    pixels = digits.images[digits.target == 7][0] / 16 * 255
    Image.fromarray(pixels.astype("uint8")).save(path)
    return path
