"""Reads the headers of image files with Pillow. Imports no torch: settings are checked with it."""

from pathlib import Path
from typing import Any

from syncbn.training.errors import SettingError

# Pillow goes by the content, not by the suffix: without this, PostScript named x.jpg would start Ghostscript. "PPM" is
# all of PNM, and "JPEG" opens the MPO files of cameras too.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
INSTALL = "Pillow reads image files and is not installed; pip install pillow"


def pillow() -> Any:
    """Import Pillow on first use, since it is an optional dependency.

    Raises:
        SettingError: it is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        raise SettingError("data", hint=INSTALL) from error
    return Image, ImageOps


def is_colour(path: str | Path) -> bool:
    """Whether the header says that the image has colours; only the header is read.

    Raises:
        OSError: the file cannot be read, or is no image.
    """
    image_module, _ = pillow()
    with image_module.open(path, formats=FORMATS) as image:
        return image.mode not in ("1", "L", "LA", "La", "I", "F") and not image.mode.startswith("I;")
