"""Reads an image file with Pillow: 8 bits per channel, grey or RGB, turned as its EXIF orientation says."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn.training.data.images.headers import FORMATS, pillow


def open_image(path: str | Path, channels: int) -> Any:
    """Read a whole file as a Pillow image of mode "L" (1 channel) or "RGB" (3 channels).

    16 bits per channel become 8, by their high byte. CMYK and palettes are converted. Transparency is dropped, as
    torchvision does. Of an animation the first frame is taken.

    Raises:
        OSError: the file is damaged, truncated, empty or no image of :data:`.headers.FORMATS`, or has pixels of 32-bit
            floats, or of 32-bit integers outside 0 to 65535.
    """
    image_module, _ = pillow()
    with image_module.open(path, formats=FORMATS) as image:
        image.load()
        return converted(image, channels)


def converted(image: Any, channels: int) -> Any:
    """A Pillow image that is open, as :func:`open_image` returns it."""
    image_module, operations = pillow()
    if image.mode == "F":
        raise OSError("its pixels are 32-bit floats, which have no fixed range")
    try:
        turned = operations.exif_transpose(image)
    except Exception:  # damaged EXIF data; the pixels are whole
        turned = image
    if turned.mode == "I" or turned.mode.startswith("I;"):  # Pillow's convert would clip 16 bits to 255
        values = np.asarray(turned)
        if values.min() < 0 or values.max() > 65535:
            raise OSError("its pixels are 32-bit integers, which have no fixed range")
        turned = image_module.fromarray((values >> 8).astype(np.uint8))
    if turned.mode in ("P", "PA"):
        turned = turned.convert("RGBA")
    return turned.convert("L" if channels == 1 else "RGB")


def as_tensor(image: Any) -> Tensor:
    """The pixels of a Pillow image, uint8 of shape ``(C, H, W)``."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def fitted(image: Any, size: tuple[int, int], crop_pct: float) -> Any:
    """Scale and crop a Pillow image to ``size`` (height, width); an image of that size is left as it is.

    As timm does for evaluation: the image is scaled (bicubic, antialiased) until it covers ``size / crop_pct``, and the
    center is cropped.
    """
    height, width = size
    if (image.height, image.width) == size:
        return image
    image_module, _ = pillow()
    scale = max(height / image.height, width / image.width) / crop_pct
    scaled = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(scaled, image_module.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
