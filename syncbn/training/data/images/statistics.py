"""Reads every image once: names those that cannot be read, and sums the pixels of the training images exactly."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from syncbn.training.atomic_write import replacing
from syncbn.training.data.images.decode import as_tensor, open_image
from syncbn.training.data.images.headers import is_colour
from syncbn.training.data.images.listing import Listing
from syncbn.training.errors import SettingError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation, from torchvision's pages
VERSION = 1  # of the cache file
INLINE = 500  # files that one process reads faster than workers start


@dataclass
class Facts:
    """What reading all images has found.

    Attributes:
        unreadable: files that cannot be read, each with the reason.
        colours: some files that have colours although one channel was asked for.
        sizes: the size (height, width) of all images if it is the same, otherwise empty.
        count: pixels of the readable training images, per channel.
        total, squares: for each channel the sum of the pixels (0 to 255) and of their squares; exact integers.
        seconds: that it took.
    """

    unreadable: list[list[str]] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    count: int = 0
    total: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the pixels in [0, 1], per channel."""
        return mean_and_std(self.count, self.total, self.squares)


def mean_and_std(count: int, total: Iterable[int], squares: Iterable[int]) -> tuple[list[float], list[float]]:
    """Mean and (population) standard deviation of values in [0, 1] from exact sums of values from 0 to 255.

    The numerator of the variance is an integer of any size, so nothing cancels. A constant channel has deviation 1.
    """
    mean, std = [], []
    for one, two in zip(total, squares, strict=True):
        mean.append(one / (255 * count))
        variance = count * two - one * one
        std.append(sqrt(variance) / (255 * count) if variance else 1.0)
    return mean, std


def of_tensor(images: Tensor, chunk: int = 1000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of uint8 images of shape ``(N, C, H, W)``, per channel, in [0, 1]."""
    channels = images.shape[1]
    total, squares = [0] * channels, [0] * channels
    for part in images.split(chunk):
        one, two = _sums(part.transpose(0, 1))
        total = [a + b for a, b in zip(total, one, strict=True)]
        squares = [a + b for a, b in zip(squares, two, strict=True)]
    return mean_and_std(images.numel() // channels, total, squares)


def measured(listing: Listing, channels: int, workers: int, cache: Path | None) -> tuple[Facts, bool]:
    """Read every image of a listing, or the results of an earlier reading from the cache.

    Args:
        listing: the files. The cached results hold as long as their names, sizes and times of change do.
        channels: 1 or 3.
        workers: processes that read, for many files.
        cache: directory of the results; None for none. A cache that cannot be written is left out. Nothing is kept
            while a file is unreadable, since a repair need not change its size or time.

    Returns:
        The facts, and whether they were in the cache.
    """
    file = None if cache is None else cache / f"images-{listing.digest()}-{channels}.json"
    if file is not None and (found := _cached(file, channels)) is not None:
        return found, True
    start = time.monotonic()
    facts = _read_all(listing, channels, workers)
    facts.seconds = time.monotonic() - start
    if file is not None and not facts.unreadable:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as draft:
                draft.write_text(json.dumps({"version": VERSION, **asdict(facts)}), encoding="utf-8")
    return facts, False


def cache_directory(setting: str | None) -> Path | None:
    """The directory of ``data.cache_dir``; null is ``syncbn`` in the user's cache directory, None if there is none.

    Raises:
        SettingError: the setting begins with ``~``, and the user has no home directory.
    """
    try:
        if setting is not None:
            return Path(setting).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "syncbn")
    except RuntimeError as error:  # no HOME, and no entry in the password database: a container with any user ID
        if setting is None:
            return None
        raise SettingError("data.cache_dir", setting, "there is no home directory; use a path without ~") from error


def _cached(file: Path, channels: int) -> Facts | None:
    try:
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        facts = Facts(**held) if held.pop("version", None) == VERSION else None
        return facts if facts is not None and _is_whole(facts, channels) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _is_whole(facts: Facts, channels: int) -> bool:
    """Whether a cache file held all fields, with the values that :func:`measured` writes."""
    lists: dict[str, tuple[list[Any], type, tuple[int, ...]]] = {
        "colours": (facts.colours, str, tuple(range(11))),
        "sizes": (facts.sizes, int, (0, 2)),
        "total": (facts.total, int, (channels,)),
        "squares": (facts.squares, int, (channels,)),
    }
    typed = all(
        isinstance(values, list) and len(values) in lengths and all(type(each) is kind for each in values)
        for values, kind, lengths in lists.values()
    )
    return typed and facts.unreadable == [] and type(facts.count) is int and facts.count > 0


class _Reader(Dataset[Any]):
    """Item i is what reading file i found: (its error, whether it has colours, its size, its sums)."""

    def __init__(self, files: list[tuple[str, bool]], channels: int) -> None:
        self.files, self.channels = files, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, bool, tuple[int, int], tuple[list[int], list[int]] | None]:
        path, summed = self.files[index]
        try:
            colour = self.channels == 1 and is_colour(path)
            pixels = as_tensor(open_image(path, self.channels))
        except Exception as error:  # Pillow raises SyntaxError and others for damaged files
            return f"{type(error).__name__}: {error}".replace(path, Path(path).name), False, (0, 0), None
        return "", colour, (pixels.shape[1], pixels.shape[2]), _sums(pixels) if summed else None


def _read_all(listing: Listing, channels: int, workers: int) -> Facts:
    training = {path for path, _ in listing.parts["train"]}
    paths = dict.fromkeys(path for part in listing.parts.values() for path, _ in part)
    files = [(path, path in training) for path in paths]
    facts, sizes = Facts(total=[0] * channels, squares=[0] * channels), Counter[tuple[int, int]]()
    workers = 0 if len(files) < INLINE else workers
    reader = DataLoader(
        _Reader(files, channels), batch_size=None, num_workers=workers, generator=torch.Generator(), collate_fn=_same
    )
    for (path, _), (error, colour, size, sums) in zip(files, reader, strict=True):
        if error:
            facts.unreadable.append([path, error])
            continue
        sizes[size] += 1
        if colour and len(facts.colours) < 10:
            facts.colours.append(path)
        if sums is not None:
            facts.count += size[0] * size[1]
            facts.total = [a + b for a, b in zip(facts.total, sums[0], strict=True)]
            facts.squares = [a + b for a, b in zip(facts.squares, sums[1], strict=True)]
    facts.sizes = list(next(iter(sizes))) if len(sizes) == 1 else []
    return facts


def _sums(pixels: Tensor) -> tuple[list[int], list[int]]:
    """Sum and sum of squares per first dimension, from a histogram: exact, and faster than wider integers."""
    counts = np.stack([np.bincount(each.reshape(-1).numpy(), minlength=256) for each in pixels.contiguous()])
    values = np.arange(256, dtype=np.int64)
    return (counts @ values).tolist(), (counts @ values**2).tolist()


def _same(item: Any) -> Any:
    return item
