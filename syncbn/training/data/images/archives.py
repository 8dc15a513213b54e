"""Reads the archives of CIFAR and of MNIST-like data sets. Nothing in them is executed."""

import codecs
import gzip
import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn.training.data.images import archive_sources
from syncbn.training.errors import SettingError

CIFAR = {  # folder, archive, training files, test file, key of the labels, file and key of the class names
    "cifar10": (
        ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        ([f"data_batch_{number}" for number in range(1, 6)], "test_batch"),
        (b"labels", "batches.meta", b"label_names"),
    ),
    "cifar100": (
        ("cifar-100-python", "cifar-100-python.tar.gz"),
        (["train"], "test"),
        (b"fine_labels", "meta", b"fine_label_names"),
    ),
}
Part = tuple[Tensor, Tensor]  # images, uint8 of shape (N, C, H, W), and labels, int64 of shape (N,)


# The functions that a pickled array calls. numpy has renamed the module of the first one.
CALLED = {
    "numpy.core.multiarray _reconstruct": np.empty(0).__reduce__()[0],
    "numpy ndarray": np.ndarray,
    "numpy dtype": np.dtype,
    "_codecs encode": codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    """Builds arrays, lists, dicts and strings only: a pickle can call any function, and this one calls four."""

    def find_class(self, module: str, name: str) -> Any:
        known = CALLED.get(f"{module.replace('._core', '.core')} {name}")
        if known is None:
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no CIFAR archive does")
        return known


def cifar(root: str, name: str) -> tuple[Part, Part, list[str]]:
    """Read CIFAR-10 or CIFAR-100 from its python archive, as ``.tar.gz`` or extracted.

    Args:
        root: the directory of the archive or of the extracted folder, that folder, or the archive itself.
        name: "cifar10" or "cifar100".

    Returns:
        The training part, the test part, and the names of the classes.

    Raises:
        SettingError: the archive is not there, or a file in it is missing or damaged.
    """
    _, (training, test), (key, meta, names) = CIFAR[name]
    held = dict(_cifar_files(root, name, {*training, test, meta}))
    train = [_cifar_part(held[file], key, root, file) for file in training]
    tested = _cifar_part(held[test], key, root, test)
    try:
        classes = [str(each, "utf-8") for each in _unpickled(held[meta], root, meta)[names]]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise _damaged(root, meta, error) from error
    for file, (_, labels) in zip([*training, test], [*train, tested], strict=True):
        if not len(labels):
            raise _damaged(root, file, "it has no image")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise _damaged(root, file, f"it has labels outside 0 to {len(classes) - 1}")
    return (torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])), tested, classes


def _cifar_files(root: str, name: str, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    (folder, archive), _, _ = CIFAR[name]
    base = Path(root).expanduser()
    for place in (base, base / folder):
        if all((place / file).is_file() for file in wanted):
            yield from ((file, (place / file).read_bytes()) for file in sorted(wanted))
            return
    packed = base if base.is_file() else base / archive
    if not packed.is_file():
        hint = f"there is no {archive}, and no whole folder {folder}; get {archive_sources.cifar(name)}"
        raise SettingError("data.root", root, hint)
    try:
        with tarfile.open(packed) as members:
            for member in members:
                file = Path(member.name).name
                if file in wanted and member.isfile() and (content := members.extractfile(member)):
                    yield file, content.read()
                    wanted = wanted - {file}
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise _damaged(root, packed.name, error) from error
    if wanted:
        raise _damaged(root, packed.name, f"it lacks {', '.join(sorted(wanted))}")


def _cifar_part(content: bytes, key: bytes, root: str, file: str) -> Part:
    held = _unpickled(content, root, file)
    try:
        images = torch.from_numpy(np.ascontiguousarray(held[b"data"], np.uint8)).reshape(-1, 3, 32, 32)
        labels = torch.tensor(held[key], dtype=torch.int64)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(root, file, error) from error
    if len(images) != len(labels):
        raise _damaged(root, file, f"{len(images)} images and {len(labels)} labels")
    return images, labels


def _unpickled(content: bytes, root: str, file: str) -> Any:
    try:
        held = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        return {key if isinstance(key, bytes) else str(key).encode(): value for key, value in held.items()}
    except Exception as error:  # a damaged pickle raises nearly anything
        raise _damaged(root, file, error) from error


def idx(root: str, source: str) -> tuple[Part, Part]:
    """Read a data set in MNIST's format: four idx files, each with ``.gz`` or without.

    Args:
        root: a directory that has the files, in itself or in a folder below. Names may begin with another word, as
            EMNIST's do (``emnist-letters-train-images-idx3-ubyte.gz``).
        source: where to get the files, for the error.

    Returns:
        The training part and the test part; images are grey, of shape ``(N, 1, H, W)``.

    Raises:
        SettingError: a file is missing, ambiguous or damaged.
    """
    parts = []
    for words in ("train", "t10k|test"):
        images = _read_idx(root, words, "images-idx3", source)
        labels = _read_idx(root, words, "labels-idx1", source)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not images.size:
            raise _damaged(root, words, f"images of shape {images.shape} and labels of shape {labels.shape}")
        parts.append((torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    return parts[0], parts[1]


def _read_idx(root: str, words: str, kind: str, source: str) -> Any:
    base, names = Path(root).expanduser(), [f"{word}-{kind}-ubyte" for word in words.split("|")]
    found = {
        path.name.removesuffix(".gz"): path  # extracted or not, the file is the same
        for name in names
        for pattern in (f"*{name}.gz", f"*{name}")
        for path in sorted(base.rglob(pattern))
    }
    if not found:
        raise SettingError(
            "data.root", root, f"there is no {names[0]} or {names[0]}.gz; get the four files from {source}"
        )
    if len(found) > 1:
        hint = f"{len(found)} data sets are there: {', '.join(sorted(found)[:3])}; use a directory with one of them"
        raise SettingError("data.root", root, hint)
    (path,) = found.values()
    try:
        with closing(gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            content = file.read()
        zero, element, dimensions = struct.unpack(">HBB", content[:4])
        if zero or element != 8:  # 8: unsigned bytes
            raise ValueError("it is no idx file of bytes")
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, zlib.error, EOFError, ValueError, struct.error) as error:
        raise _damaged(root, path.name, error) from error


def _damaged(root: str, file: str, error: object) -> SettingError:
    about = " ".join(f"{type(error).__name__}: {error}".split()) if isinstance(error, Exception) else str(error)
    return SettingError("data.root", root, f"{file} is damaged ({about}); get it again")
