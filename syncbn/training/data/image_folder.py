"""The data module of images in one folder per class: ``data=folder data.root=DIR``."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from math import inf
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from syncbn.training.data.image_data import ImageData, ImageSet, report
from syncbn.training.data.images import listing, statistics
from syncbn.training.data.images.cache import ImageCache
from syncbn.training.data.images.decode import as_tensor, fitted, open_image
from syncbn.training.data.images.headers import pillow
from syncbn.training.data.images.statistics import Facts
from syncbn.training.data.transforms.augmentation import Augmentation
from syncbn.training.errors import AgreedError, SettingError

DEFAULT_SIZE = 224  # where the images have different sizes, as timm
CROP_PCT = 0.875
SHOWN = 50  # unreadable files that are printed
SMALLEST = 1e-6  # GiB of the cache: about 1 kB
UNREADABLE = ("fail", "skip")
_known: dict[tuple[str, int], Facts] = {}  # what this process has measured: the test has a data module of its own
_skipped: set[str] = set()  # directories whose unreadable files were reported
_taken: set[tuple[str, str]] = set()  # directories and what was reported to be taken from a checkpoint
_resumed: dict[str, dict[str, Any]] = {}  # by directory: the state of the fit's checkpoint, for a test of final weights


class ImageFolder(ImageData):
    """Images of shape ``(C, size, size)`` from ``ROOT/train/CLASS/*`` and ``ROOT/val/CLASS/*``, or ``ROOT/CLASS/*``.

    See :func:`.images.listing.find` for the layouts and the split. Before training every file is read once, on rank 0:
    unreadable files are named, and the mean and the standard deviation are measured. The result is kept in
    ``cache_dir``, by the names, sizes and times of all files.

    Args:
        root: the directory.
        size: height and width of the network's input, or a pair; None for the size of the images if they all have the
            same, otherwise 224.
        crop_pct: an image of another size is scaled to ``size / crop_pct``, then its center is cropped; None for 0.875,
            or that of the checkpoint.
        test_fraction: share of the images for the test, by class, where ``root`` has no folder ``train``.
        unreadable: "fail" if a file cannot be read, or "skip" it.
        cache: GiB of memory per device for decoded images; None for none.
        cache_dir: directory for what reading all files has found; None for ``~/.cache/syncbn``.
        settings: see :class:`.image_data.ImageData`.

    Raises:
        SettingError: settings that cannot work; in ``setup``, unreadable files, or grey images that have colours.
    """

    def __init__(
        self,
        root: str | None,
        batch_size: int = 32,
        *,
        size: int | Sequence[int] | None = None,
        crop_pct: float | None = None,
        test_fraction: float = 0.1,
        unreadable: str = "fail",
        cache: float | None = None,
        cache_dir: str | None = None,
        channels: int | None = None,
        in_channels: int | None = None,
        **settings: Any,
    ) -> None:
        pillow()
        found = listing.facts(root, channels)
        super().__init__(batch_size, in_channels=channels or in_channels or found["in_channels"], **settings)
        listing.check_fractions(self.val_fraction, test_fraction)
        self.root, self.size, self.crop_pct = str(Path(str(root)).expanduser()), check_size(size), crop_pct or CROP_PCT
        self.given = {"size": self.size, "crop_pct": crop_pct, "channels": channels}
        if crop_pct is not None and not (isinstance(crop_pct, int | float) and 0 < crop_pct <= 1):
            raise SettingError("data.crop_pct", crop_pct, "use a share above 0 and up to 1")
        if unreadable not in UNREADABLE:
            raise SettingError("data.unreadable", unreadable, f"use one of {', '.join(UNREADABLE)}")
        if cache is not None and not (isinstance(cache, int | float) and SMALLEST <= cache < inf):
            raise SettingError("data.cache", cache, f"use a number of GiB, {SMALLEST} or more, or null")
        self.test_fraction, self.unreadable, self.channels = test_fraction, unreadable, channels
        self.cache, self.cache_dir = cache, statistics.cache_directory(cache_dir)
        self.facts: Facts | None = None
        self.listing = listing.Listing([])
        self._caches: dict[str, ImageCache] = {}

    def prepare_data(self) -> None:
        # Lightning calls this on rank 0 only, while the other ranks wait without a time-out. An error is raised in
        # setup(), by all ranks.
        self._measure(listing.find(self.root, self.val_fraction, self.test_fraction, self.split_seed))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "test" and self.root in _resumed:  # a test of the final weights loads no checkpoint
            self.load_state_dict(_resumed[self.root])

    def load(self) -> None:
        self.listing = listing.find(self.root, self.val_fraction, self.test_fraction, self.split_seed)
        self.classes = self.listing.classes
        self.facts = self._shared_facts()
        self._check_unreadable(self.facts)
        if self.channels is None and self.in_channels == 1 and self.facts.colours:
            hint = f"some images have colours, such as {self.facts.colours[0]}; use data.channels=3, or 1 to drop them"
            raise AgreedError("data.channels", None, hint)
        sizes = self.facts.sizes
        self.size = self.size or ((sizes[0], sizes[1]) if sizes else (DEFAULT_SIZE, DEFAULT_SIZE))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({"files": self._names(), **self._input()} if self._ready else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take mean, standard deviation, size, crop and channels of the checkpoint.

        Raises:
            AgreedError: the checkpoint's run had other classes, or a training is resumed on other files; ``size``,
                ``crop_pct`` or ``channels`` is given and was another.
        """
        super().load_state_dict(state_dict)
        self._take_input({name: state_dict[name] for name in self.given if name in state_dict})
        fitting = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        theirs = state_dict.get("files")
        if fitting and theirs is not None and self._ready and theirs != self._names():
            hint = "files were added to or removed from its training images since the checkpoint; restore them, or "
            raise AgreedError("data.root", self.root, f"{hint}start a new run from its weights (ckpt_restore=weights)")
        if fitting:
            _resumed[self.root] = state_dict

    def _input(self) -> dict[str, Any]:
        """What decides how an image becomes the input of the network."""
        return {"size": self.size, "crop_pct": self.crop_pct, "channels": self.in_channels}

    def _take_input(self, theirs: dict[str, Any]) -> None:
        """Use these values of :meth:`_input`, and report those that would have been others."""
        theirs |= {"size": tuple(theirs["size"])} if "size" in theirs else {}
        differ = {name: value for name, value in theirs.items() if value != self._input()[name]}
        for name, value in differ.items():
            if (given := self.given[name]) is not None:
                hint = f"the checkpoint's run had {_as_set(value)}; leave it out, or use that"
                raise AgreedError(f"data.{name}", _as_set(given), hint)
        if differ:
            listed = " ".join(f"data.{name}={_as_set(value)}" for name, value in differ.items())
            if (self.root, listed) not in _taken:  # the test of a run has a data module of its own
                _taken.add((self.root, listed))
                report(self, f"taken from the checkpoint: {listed}")
        self.size, self.crop_pct = theirs.get("size", self.size), theirs.get("crop_pct", self.crop_pct)
        self.in_channels = theirs.get("channels", self.in_channels)

    def _names(self) -> str:
        """A hash of the names of the training files, in their order, which a position in an epoch depends on."""
        names = [f"{os.path.relpath(path, self.root)}\0{label}" for path, label in self.listing.parts["train"]]
        return blake2b("\0".join(names).encode(errors="surrogateescape"), digest_size=16).hexdigest()

    def labels(self, part: str) -> Sequence[int]:
        return [label for _, label in self.listing.parts[part]]

    def image_set(self, part: str) -> ImageSet:
        assert self.size is not None
        files = self.listing.parts[part]
        augment = None if self.augment is None or part != "train" else Augmentation(self.augment, self.size)
        assert self.in_channels is not None
        size = None if augment is not None and augment.crops else self.size
        read = _Read([path for path, _ in files], self.in_channels, size, self.crop_pct, self._cache(part, len(files)))
        return ImageSet(read, [label for _, label in files], self.normalize(), augment, files)

    def measure(self) -> tuple[list[float], list[float]]:
        assert self.facts is not None
        return self.facts.mean_and_std()

    def about(self) -> dict[str, Any]:
        assert self.facts is not None
        more = {"size": self.size, "channels": self.in_channels, "other files": self.listing.ignored}
        return super().about() | more | {"unreadable": self.facts.unreadable}

    def _measure(self, files: listing.Listing) -> Facts:
        assert self.in_channels is not None
        key = files.digest(), self.in_channels
        if key not in _known:
            workers = min(8, os.cpu_count() or 1)
            facts, cached = statistics.measured(files, self.in_channels, workers, self.cache_dir)
            _known[key] = facts
            images = sum(len(each) for name, each in files.parts.items() if name != "test" or not _same(files))
            took = f"as found before ({self.cache_dir})" if cached else f"in {facts.seconds:.1f} s"
            text = f"data: {images} images in {len(files.classes)} classes, all read {took}"
            if facts.count:
                mean, std = (", ".join(f"{each:.4f}" for each in values) for values in facts.mean_and_std())
                text += f"; training images: mean {mean}, std {std}"
            report(self, text)
        return _known[key]

    def _shared_facts(self) -> Facts:
        """The facts of rank 0, on all ranks."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self._measure(self.listing)
        held: list[Any] = [None]
        if dist.get_rank() == 0:
            held = [(self.listing.digest(), self._measure(self.listing))]
        dist.broadcast_object_list(held)
        digest, facts = held[0]
        if digest != self.listing.digest():
            hint = (
                f"rank {dist.get_rank()} sees other files there than rank 0; wait until the directory does not change"
            )
            raise SettingError("data.root", self.root, hint)
        return cast(Facts, facts)

    def _check_unreadable(self, facts: Facts) -> None:
        if not facts.unreadable:
            return
        first, bad = facts.unreadable[0], len(facts.unreadable)
        if self.unreadable == "fail":
            for path, why in facts.unreadable[:SHOWN]:
                report(self, f"cannot be read: {path} ({why})")
            if bad > SHOWN:
                report(self, f"and {bad - SHOWN} more")
            named = "1 file cannot" if bad == 1 else f"{bad} files cannot"
            hint = f"{named} be read, such as {Path(first[0]).name}; repair or remove, or use data.unreadable=skip"
            raise AgreedError("data.root", self.root, hint)
        skipped = {path for path, _ in facts.unreadable}
        for part, files in self.listing.parts.items():
            self.listing.parts[part] = [each for each in files if each[0] not in skipped]
        if lacking := set(range(len(self.classes))) - {label for _, label in self.listing.parts["train"]}:
            name = self.classes[min(lacking)]
            raise AgreedError("data.unreadable", "skip", f"no training image of class {name} is left")
        if self.root not in _skipped:  # the test of a run has a data module of its own
            _skipped.add(self.root)
            out = "1 file is left out:" if bad == 1 else f"{bad} files are left out, such as"
            report(self, f"data.unreadable=skip: {out} {first[0]} ({first[1]})")

    def _cache(self, part: str, images: int) -> ImageCache | None:
        if self.cache is None or part == "test":  # the test reads each image once
            return None
        if part not in self._caches:
            share = 0.9 if part == "train" else 0.1
            try:
                self._caches[part] = ImageCache(images, int(self.cache * share * 2**30))
            except (OSError, ValueError, OverflowError) as error:  # of mmap
                why = " ".join(str(error).split())
                raise SettingError("data.cache", self.cache, f"no such memory ({why}); use fewer GiB") from error
        return self._caches[part]

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self._caches:
            used = [each.used() for each in self._caches.values()]
            size, kept = (sum(column) for column in zip(*used, strict=True))
            all_images = sum(each.images for each in self._caches.values())
            limit = f"data.cache={self.cache:g} GiB per device"
            report(self, f"{limit}: {kept} of {all_images} images were kept, {size / 2**20:.0f} MiB")


class _Read:
    """Reads, scales and crops the image of an index, or takes it from the cache."""

    def __init__(
        self, paths: list[str], channels: int, size: tuple[int, int] | None, crop_pct: float, cache: ImageCache | None
    ) -> None:
        self.paths, self.channels, self.size, self.crop_pct, self.cache = paths, channels, size, crop_pct, cache

    def __call__(self, index: int) -> Any:
        return self._decode(index) if self.cache is None else self.cache.get(index, lambda: self._decode(index))

    def _decode(self, index: int) -> Any:
        image = open_image(self.paths[index], self.channels)
        return as_tensor(image if self.size is None else fitted(image, self.size, self.crop_pct))


def check_size(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """``data.size`` as (height, width); None if it is null.

    Raises:
        SettingError: it is neither a number of pixels nor two of them.
    """
    pair = (size, size) if isinstance(size, int) else size
    if pair is None:
        return None
    whole = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    if not whole or not all(isinstance(each, int) and not isinstance(each, bool) and each >= 1 for each in pair):
        raise SettingError("data.size", size, "use a number of pixels, 1 or more, or [height,width], or null")
    height, width = pair
    return height, width


def _as_set(value: Any) -> str:
    """A size (height, width), or another value, as on the command line."""
    if not isinstance(value, tuple):
        return str(value)
    return str(value[0]) if value[0] == value[1] else f"[{value[0]},{value[1]}]"


def _same(files: listing.Listing) -> bool:
    """Whether the test uses the validation images."""
    return files.parts["test"] == files.parts["val"]
