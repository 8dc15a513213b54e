"""Decoded images in memory, shared by the loader processes of one rank."""

import mmap
import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_EMPTY = -1


class ImageCache:
    """Keeps uint8 tensors of shape ``(C, H, W)`` by index, up to a number of bytes; more are not kept.

    The memory is an anonymous shared mapping, made before the loader processes are forked, so all of them read what one
    has decoded. Pages are used when they are written. A process that is not forked (``spawn``) has an empty cache that
    keeps nothing, which is slower and as exact.

    Args:
        images: number of images.
        limit: bytes for their pixels.
    """

    def __init__(self, images: int, limit: int) -> None:
        self.images, self.limit = images, limit
        self._lock: Any = multiprocessing.get_context("fork").Lock()
        # Per image: offset, channels, height, width; in the last row the number of bytes in use and of images kept.
        self._table = np.frombuffer(mmap.mmap(-1, (images + 1) * 4 * 8), np.int64).reshape(images + 1, 4)
        self._table[:images, 0] = _EMPTY
        self._pixels = np.frombuffer(mmap.mmap(-1, limit), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the memory: a pickled copy would be another process's, and keeps nothing."""
        return {"images": self.images, "limit": 0, "_lock": None}

    def get(self, index: int, read: Callable[[], Tensor]) -> Tensor:
        """The image of this index; ``read`` is called if it is not kept."""
        if self._lock is None:
            return read()
        with self._lock:
            offset, *shape = self._table[index].tolist()
        if offset != _EMPTY:
            size = shape[0] * shape[1] * shape[2]
            return torch.from_numpy(self._pixels[offset : offset + size].reshape(shape).copy())
        image = read()
        self._keep(index, image.numpy())
        return image

    def used(self) -> tuple[int, int]:
        """Bytes in use, and images kept."""
        return (0, 0) if self._lock is None else (int(self._table[-1, 0]), int(self._table[-1, 1]))

    def _keep(self, index: int, image: Any) -> None:
        with self._lock:
            used = int(self._table[-1, 0])
            if self._table[index, 0] != _EMPTY or used + image.size > self.limit:
                return
            self._pixels[used : used + image.size] = image.reshape(-1)
            self._table[index] = (used, *image.shape)
            self._table[-1, :2] += (image.size, 1)
