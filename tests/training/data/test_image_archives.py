"""CIFAR and MNIST-like archives: tiny ones, in the official formats, and damaged ones."""

import gzip
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from syncbn.training import CIFAR, MNIST
from syncbn.training.data.images import archives
from tests.support.refuses import refuses

NAMES = [b"airplane", b"automobile"]


def _pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def cifar10(root: Path, classes: int = 2, images: int = 4) -> Path:
    """An archive with ``images`` in each of its six files, of as many classes: 20 training and 4 test images of two."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*NAMES, *(f"class {label}".encode() for label in range(2, classes))][:classes]
    labels = [index % classes for index in range(images)]
    files: dict[str, Any] = {
        f"data_batch_{n}": {b"data": _pixels(images, n), b"labels": labels, b"batch_label": b"x"} for n in range(1, 6)
    }
    test = {b"data": _pixels(images, 9), b"labels": [(label + 1) % classes for label in labels]}
    files |= {"test_batch": test, "batches.meta": {b"label_names": names}}
    for name, held in files.items():
        (folder / name).write_bytes(pickle.dumps(held, protocol=2))
    return folder


def data(root: Path, **settings: Any) -> CIFAR:
    found = CIFAR(str(root), 4, num_classes=2, val_fraction=0.2, **settings)
    found.setup("fit")
    return found


@pytest.fixture(autouse=True)
def fresh() -> None:
    from syncbn.training.data import image_archives

    image_archives._cifar.cache_clear()
    image_archives._idx.cache_clear()


def test_cifar_is_read_from_a_folder_and_from_the_archive(tmp_path: Path) -> None:
    folder = cifar10(tmp_path / "a")
    one = data(tmp_path / "a")
    assert one.classes == ["airplane", "automobile"]
    assert [len(one.labels(part)) for part in ("train", "val", "test")] == [16, 4, 4]
    assert one.class_counts == [8, 8]
    (tmp_path / "b").mkdir()
    packed = tmp_path / "b/cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-py")
    for root in (folder, tmp_path / "b", packed):
        other = data(root)
        assert torch.equal(other._parts["train"][0], one._parts["train"][0])
    expected = _pixels(4, 9).reshape(4, 3, 32, 32)
    assert torch.equal(one._parts["test"][0], torch.from_numpy(expected))
    mean, std = one.measure()
    pixels = one._parts["train"][0].double() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3), correction=0), rtol=1e-13)
    x, y = next(iter(one.test_dataloader()))
    assert (x.shape, x.dtype, y.tolist()) == ((4, 3, 32, 32), torch.float32, [1, 0, 1, 0])


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, n in (("train", 10), ("test", 2)):
        held = {b"data": _pixels(n), b"fine_labels": [i % 2 for i in range(n)], b"coarse_labels": [9] * n}
        (folder / name).write_bytes(pickle.dumps(held, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": NAMES}, protocol=2))
    assert data(tmp_path, name="cifar100").labels("test") == [0, 1]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def test_a_pickle_that_calls_anything_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = cifar10(tmp_path)
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
    with refuses("data.root", str(tmp_path), "test_batch is damaged", "it calls posix.mkdir"):
        data(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_pickle_of_an_old_numpy_is_read_without_a_warning() -> None:
    """The official archives name numpy.core, which numpy 2 has renamed."""
    content = pickle.dumps(np.arange(3, dtype=np.uint8), protocol=2)
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core" in old
    assert archives._Unpickler(__import__("io").BytesIO(old), encoding="bytes").load().tolist() == [0, 1, 2]


def test_archives_that_are_missing_or_damaged_are_refused(tmp_path: Path) -> None:
    with refuses("data.root", None, "it is missing", "cifar-10-python.tar.gz"):
        CIFAR(None).setup("fit")
    with refuses("data.root", str(tmp_path), "there is no cifar-10-python.tar.gz", "; get https://www.cs.toronto"):
        data(tmp_path)
    folder = cifar10(tmp_path)
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(whole[:100])
    with refuses("data.root", str(tmp_path), "data_batch_3 is damaged"):
        data(tmp_path)
    for labels, words in (([0, 1, 0, 2], "outside 0 to 1"), ([0, 1, 0, -1], "outside 0 to 1"), ([], "no image")):
        held = {b"data": _pixels(len(labels)), b"labels": labels}
        (folder / "data_batch_3").write_bytes(pickle.dumps(held, protocol=3))
        with refuses("data.root", str(tmp_path), "data_batch_3 is damaged", words):
            data(tmp_path)
    (folder / "data_batch_3").write_bytes(whole)
    names = (folder / "batches.meta").read_bytes()
    for held in ({}, {b"label_names": None}, {b"label_names": [b"\xff", b"b"]}):
        (folder / "batches.meta").write_bytes(pickle.dumps(held, protocol=3))
        with refuses("data.root", str(tmp_path), "batches.meta is damaged"):
            data(tmp_path)
    (folder / "batches.meta").write_bytes(names)
    packed = tmp_path / "cifar-10-python.tar.gz"
    packed.write_bytes(gzip.compress(b"x" * 5000)[:-9])
    with refuses("data.root", str(packed), "cifar-10-python.tar.gz is damaged"):
        data(packed)
    with refuses("data.num_classes", 10, "the data have 2 classes"):
        CIFAR(str(tmp_path), num_classes=10, val_fraction=0.2).setup("fit")
    with refuses("data.val_fraction", 0.99, "class 0 has too few images"):
        CIFAR(str(tmp_path), val_fraction=0.99).setup("fit")


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(root: Path, prefix: str = "", highest: int = 9, zipped: bool = True) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 40), ("t10k", 10)):
        labels = (np.arange(n) % (highest + 1)).astype(np.uint8)
        images = np.random.default_rng(n).integers(0, 256, (n, 5, 4), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = _idx(array)
            path = root / f"{prefix}{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return root


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_is_read_with_gz_and_without(tmp_path: Path, zipped: bool) -> None:
    found = MNIST(str(mnist(tmp_path / "MNIST/raw", zipped=zipped)), 4, val_fraction=0.25)
    found.setup("fit")
    assert [len(found.labels(part)) for part in ("train", "val", "test")] == [30, 10, 10]
    x, y = next(iter(found.test_dataloader()))
    assert x.shape == (4, 1, 5, 4)
    assert y.tolist() == [0, 1, 2, 3]
    assert found.classes[-1] == "9"


def test_emnist_has_more_classes_and_another_name(tmp_path: Path) -> None:
    root = mnist(tmp_path, "emnist-balanced-", highest=11)
    with refuses("data.num_classes", 10, "the labels go up to 11; use data.num_classes=12"):
        MNIST(str(root), val_fraction=0.3).setup("fit")
    found = MNIST(str(root), num_classes=12, val_fraction=0.3)
    found.setup("fit")
    assert max(found.labels("train")) == 11


def test_idx_files_that_are_missing_ambiguous_or_damaged_are_refused(tmp_path: Path) -> None:
    with refuses("data.root", str(tmp_path), "there is no train-images-idx3-ubyte", "; get the four files from http"):
        MNIST(str(tmp_path)).setup("fit")
    mnist(tmp_path / "a")
    mnist(tmp_path / "b", "kmnist-")
    with refuses("data.root", str(tmp_path), "2 data sets are there"):
        MNIST(str(tmp_path)).setup("fit")
    file = tmp_path / "a/t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-12])
    with refuses("data.root", str(tmp_path / "a"), "t10k-labels-idx1-ubyte.gz is damaged"):
        MNIST(str(tmp_path / "a")).setup("fit")
    file.write_bytes(gzip.compress(_idx(np.zeros(3, np.uint8))))
    with refuses("data.root", str(tmp_path / "a"), "is damaged (images of shape"):
        MNIST(str(tmp_path / "a")).setup("fit")
    for name, shape in (("images-idx3", (0, 5, 4)), ("labels-idx1", (0,))):
        (tmp_path / f"a/t10k-{name}-ubyte.gz").write_bytes(gzip.compress(_idx(np.zeros(shape, np.uint8))))
    with refuses("data.root", str(tmp_path / "a"), "is damaged (images of shape (0, 5, 4)"):
        MNIST(str(tmp_path / "a")).setup("fit")
