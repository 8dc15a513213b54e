"""Finds the classes and files of a folder of images, and splits them. Imports no torch."""

import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from syncbn.training.data.images.headers import is_colour
from syncbn.training.errors import SettingError

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
VALIDATION = ("val", "valid", "validation")  # names of the folder with the validation images
PROBED = 64  # images of all classes whose headers decide whether the data have colours
EXPECTS = "images are expected as CLASS/*, or as train/CLASS/* and val/CLASS/*, below data.root"


@dataclass
class Listing:
    """The image files of a data set.

    Attributes:
        classes: names of the classes, sorted; a label is an index into this list.
        parts: for "train", "val" and "test" the files, each with its label, in a fixed order.
        ignored: number of files without the suffix of an image; hidden files are not counted.
    """

    classes: list[str]
    parts: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    ignored: int = 0

    def digest(self, part: str = "") -> str:
        """A hash of the classes and of the files' names, sizes and times of change, of one part or of all."""
        found = blake2b(repr(self.classes).encode(errors="surrogateescape"), digest_size=16)
        for name in (part,) if part else sorted(self.parts):
            for path, label in self.parts[name]:
                row = f"{name}\0{path}\0{label}\0{_size_and_time(path)}\n"
                found.update(row.encode(errors="surrogateescape"))
        return found.hexdigest()


def classes(root: str | Path | None) -> list[str]:
    """The names of the classes below ``root``, found without listing all files.

    Raises:
        SettingError: there is no such directory, fewer than two class folders, a class folder without an image, or
            other classes in one part than in another.
    """
    folders = _part_folders(root)
    return _checked_classes(str(root), folders)


def find(root: str | Path | None, val_fraction: float, test_fraction: float, seed: int) -> Listing:
    """List all images, and split them where ``root`` has no folder for a part.

    The split is by class. A file's place in it depends on ``seed`` and its path below ``root`` only, so most files keep
    their part if files are added. Symbolic links are followed; nested folders belong to the class above them; hidden
    files and folders are skipped.

    Args:
        root: directory with class folders, or with ``train`` and at least one of ``val`` and ``test``.
        val_fraction: share of each class for validation, if there is no folder ``val``.
        test_fraction: share of each class for the test, if ``root`` has no folder ``train``; with 0, and where there is
            ``train`` but no ``test``, the test uses the validation images.
        seed: seed of the split.

    Raises:
        SettingError: see :func:`classes`; a share outside of its range, or a class with too few images for the split.
    """
    check_fractions(val_fraction, test_fraction)
    folders = _part_folders(root)
    listing = Listing(_checked_classes(str(root), folders))
    for part, folder in folders.items():
        listing.parts[part] = [
            (path, label)
            for name, path_of_class in _class_folders(folder).items()
            for label in (listing.classes.index(name),)
            for path in _images(path_of_class, listing)
        ]
    base = str(root)
    if "train" not in folders:
        rest, test = split(listing.parts.pop("all"), test_fraction, seed, base, ("data.test_fraction", test_fraction))
        train, val = split(rest, val_fraction / (1 - test_fraction), seed, base, ("data.val_fraction", val_fraction))
        listing.parts = {"train": train, "val": val, "test": test or val}
    elif "val" not in folders:
        train, val = split(listing.parts["train"], val_fraction, seed, base, ("data.val_fraction", val_fraction))
        listing.parts |= {"train": train, "val": val}
    listing.parts.setdefault("test", listing.parts["val"])
    return listing


def split(
    files: list[tuple[str, int]], share: float, seed: int, root: str, setting: tuple[str, float]
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Split files into two parts; the second has ``share`` of each class, at least one file of it unless it is 0.

    ``setting`` and its value are named in the error.

    Raises:
        SettingError: a class would have no file in one of the two parts.
    """
    if share == 0:
        return files, []
    groups: dict[int, list[tuple[str, int]]] = {}
    for each in files:
        groups.setdefault(each[1], []).append(each)
    chosen: set[str] = set()
    for group in groups.values():
        number = max(1, round(share * len(group)))
        if number >= len(group):
            name = Path(os.path.relpath(group[0][0], root)).parts[0] if root else group[0][1]
            hint = f"class {name} has too few images for this split ({len(group)}); add images, or use a smaller share"
            raise SettingError(*setting, hint)
        ordered = sorted(group, key=lambda each: _place(seed, os.path.relpath(each[0], root) if root else each[0]))
        chosen.update(path for path, _ in ordered[:number])
    return [each for each in files if each[0] not in chosen], [each for each in files if each[0] in chosen]


def below(folder: Path, report: Callable[[OSError], None]) -> tuple[list[str], int]:
    """The paths of all images in a folder and the folders below it, sorted, and the number of other files.

    ``report`` is called with the error of each folder that cannot be read.
    """
    listing = Listing([])
    return list(_images(folder, listing, report)), listing.ignored


def of_other_files(ignored: int) -> str:
    """What an error line adds about files that were ignored; "" if there are none."""
    if not ignored:
        return ""
    return " (1 file has another suffix)" if ignored == 1 else f" ({ignored} files have other suffixes)"


def _size_and_time(path: str) -> str:
    try:
        about = Path(path).stat()
    except OSError:  # a broken symbolic link; reading it fails later, and is reported as that of other unreadable files
        return "missing"
    return f"{about.st_size}\0{about.st_mtime_ns}"


def check_fractions(val_fraction: float, test_fraction: float = 0.0) -> None:
    """Raise a SettingError unless some images are left for training, and some are for validation."""
    for name, share, low in (("val_fraction", val_fraction, "above 0"), ("test_fraction", test_fraction, "0 or more")):
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 <= share < 1 or (share == 0 and name == "val_fraction"):
            raise SettingError(f"data.{name}", share, f"use a share {low} and below 1")
    if val_fraction + test_fraction >= 1:
        raise SettingError(
            f"data.val_fraction={val_fraction} and data.test_fraction", test_fraction, "their sum must be below 1"
        )


def _place(seed: int, path: str) -> bytes:
    return blake2b(f"{seed}\0{path}".encode(errors="surrogateescape"), digest_size=16).digest()


def _part_folders(root: str | Path | None) -> dict[str, Path]:
    """The folders of "train", "val" and "test" that exist; {"all": root} if the class folders are in ``root``."""
    if root is None:
        raise SettingError("data.root", None, f"it is missing; {EXPECTS}")
    base = Path(root).expanduser()
    try:
        names = {each.name for each in os.scandir(base) if each.is_dir() and not each.name.startswith(".")}
    except FileNotFoundError:
        raise SettingError("data.root", root, f"there is no such directory; {EXPECTS}") from None
    except NotADirectoryError:
        raise SettingError("data.root", root, f"it is no directory; {EXPECTS}") from None
    except OSError as error:
        raise SettingError("data.root", root, f"it cannot be read ({error.strerror})") from error
    val = next((name for name in VALIDATION if name in names), None)
    if "train" not in names or not (val or "test" in names or names == {"train"}):
        return {"all": base}
    found = {"train": base / "train"}
    if val is not None:
        found["val"] = base / val
    if "test" in names:
        found["test"] = base / "test"
    return found


def _checked_classes(root: str, folders: dict[str, Path]) -> list[str]:
    of_part = {part: _class_folders(folder) for part, folder in folders.items()}
    first, names = next(iter(of_part.items()))
    where = folders[first]
    if len(names) < 2:
        loose = sum(1 for _ in _images(where, Listing([]))) if not names else 0
        found = f"{where} has {len(names)} class folder{'' if len(names) == 1 else 's'}"
        found += f", and {loose} images in no class folder" if loose else ""
        raise SettingError("data.root", root, f"{found}; put the images of two or more classes into a folder each")
    for part, others in of_part.items():
        if differ := sorted(others.keys() ^ names.keys()):
            hint = f"{first} and {part} must have folders of the same names; {differ[0]} is in one of them only"
            raise SettingError("data.root", root, hint)
        for folder in others.values():
            listing = Listing([])
            if next(_images(folder, listing), None) is None:
                other = of_other_files(listing.ignored)
                hint = (
                    f"{folder} has no image{other}; add images ({', '.join(sorted(SUFFIXES)[:6])}, ...), or remove it"
                )
                raise SettingError("data.root", root, hint)
    return sorted(names)


def _class_folders(folder: Path) -> dict[str, Path]:
    """The folders of the classes by name, sorted. macOS decomposes letters with accents; the names are composed."""
    found = {
        unicodedata.normalize("NFC", each.name): Path(each.path)
        for each in os.scandir(folder)
        if each.is_dir() and not each.name.startswith(".")
    }
    return dict(sorted(found.items()))


def _images(folder: Path, listing: Listing, report: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """The paths of all images in a folder and the folders below it, sorted; other files are counted in ``listing``."""
    seen: set[tuple[int, int]] = set()
    for directory, below, names in os.walk(folder, onerror=report, followlinks=True):
        about = Path(directory).stat()
        if (about.st_dev, about.st_ino) in seen:  # a symbolic link to a folder above it
            below.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122  # a million times
                yield os.path.join(directory, name)  # noqa: PTH118
            else:
                listing.ignored += 1


def facts(root: str | Path | None, channels: Any) -> dict[str, int]:
    """``num_classes`` and ``in_channels`` of a folder, found by its names and by the headers of some images.

    Raises:
        SettingError: see :func:`classes`; ``channels`` is neither 1 nor 3 nor None; Pillow is not installed.
    """
    names = classes(root)
    if channels not in (None, 1, 3) or isinstance(channels, bool):
        raise SettingError("data.channels", channels, "use 1 (grey), 3 (colour), or null to find it out")
    return {"num_classes": len(names), "in_channels": channels or (3 if _has_colours(root) else 1)}


def _has_colours(root: str | Path | None) -> bool:
    folder = next(iter(_part_folders(root).values()))
    folders = list(_class_folders(folder).values())
    each = max(1, PROBED // len(folders))
    for path in (path for one in folders[:PROBED] for path in islice(_images(one, Listing([])), each)):
        with suppress(Exception):  # an unreadable file is named later
            if is_colour(path):
                return True
    return False
