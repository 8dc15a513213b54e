"""``data=folder``: what is found in a folder, how files are read, what is measured, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf
from PIL import Image

from syncbn.training import ImageFolder
from syncbn.training.data import image_folder, loaders
from syncbn.training.data import settings as data_settings
from syncbn.training.data.images import listing, statistics
from syncbn.training.data.images.decode import as_tensor, fitted, open_image
from syncbn.training.data.images.headers import is_colour
from syncbn.training.errors import AgreedError
from tests.support.refuses import ANY, refuses
from tests.training.data.support.pictures import pictures


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_folder, "_known", {})
    return tmp_path / "cache" / "syncbn"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = tmp_path / "images"
    pictures(base / "train", {"ant": 8, "bee": 6, "cat": 4})
    return pictures(base, {"val/ant": 2, "val/bee": 2, "val/cat": 2}, seed=1)


def folder(root: Path, **settings: Any) -> ImageFolder:
    data = ImageFolder(str(root), **{"batch_size": 4, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def test_train_and_val_are_found_and_the_test_uses_val(root: Path) -> None:
    data = folder(root)
    assert data.classes == ["ant", "bee", "cat"]
    assert (data.num_classes, data.in_channels, data.size) == (3, 3, (12, 12))
    assert data.class_counts == [8, 6, 4]
    images, labels = (torch.cat(each) for each in zip(*data.test_dataloader(), strict=True))
    assert images.shape == (6, 3, 12, 12)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert sum(len(y) for _, y in data.train_dataloader()) == 16


def test_mean_and_deviation_are_those_of_float64_over_all_training_pixels(root: Path) -> None:
    """The sums are exact, so only the last division rounds."""
    pictures(root / "train", {"ant": 3}, size=(7, 19), seed=5)  # unequal sizes: every pixel counts once
    data = folder(root, size=12)
    pixels = np.concatenate(
        [np.asarray(Image.open(path)).reshape(-1, 3) for path in sorted(root.glob("train/*/*.png"))]
    ).astype(np.float64)
    data.settle_statistics()
    np.testing.assert_allclose(data.mean, (pixels / 255).mean(0), rtol=1e-14)
    np.testing.assert_allclose(data.std, (pixels / 255).std(0), rtol=1e-13)
    image, _ = data.image_set("train")[0]
    first = np.asarray(Image.open(data.listing.parts["train"][0][0])).transpose(2, 0, 1) / 255
    if first.shape == (3, 12, 12):
        expected = (first - np.array(data.mean)[:, None, None]) / np.array(data.std)[:, None, None]
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)


def test_statistics_of_images_in_memory_are_exact() -> None:
    images = torch.randint(0, 256, (2500, 2, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = statistics.of_tensor(images)
    values = images.double() / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-14)
    np.testing.assert_allclose(std, values.std((0, 2, 3), correction=0), rtol=1e-13)
    assert statistics.of_tensor(torch.full((2, 1, 2, 2), 7, dtype=torch.uint8)) == ([7 / 255], [1.0])


def test_what_was_read_is_kept_until_a_file_changes(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = folder(root)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(image_folder, "_known", {})
    monkeypatch.setattr(statistics, "_read_all", lambda *_: pytest.fail("it was read again"))
    again = folder(root)
    assert again.measure() == first.measure()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    pictures(root / "train", {"ant": 1}, seed=9)
    assert folder(root).measure() != first.measure()


def test_a_damaged_cache_is_measured_again_and_one_that_cannot_be_written_is_left_out(root: Path, cache: Path) -> None:
    first = folder(root)
    (file,) = cache.iterdir()
    file.write_text("{", encoding="utf-8")
    image_folder._known.clear()
    assert folder(root).measure() == first.measure()
    image_folder._known.clear()
    blocked = cache / "file"
    blocked.write_text("", encoding="utf-8")
    assert folder(root, cache_dir=str(blocked)).measure() == first.measure()


@pytest.mark.parametrize("held", [{}, {"total": []}, {"total": ["x"] * 3}, {"count": 0}, {"sizes": [1]}])
def test_a_cache_that_lacks_values_is_measured_again(root: Path, cache: Path, held: dict[str, Any]) -> None:
    first = folder(root)
    (file,) = cache.iterdir()
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(whole | held if held else {"version": 1}), encoding="utf-8")
    image_folder._known.clear()
    assert folder(root).measure() == first.measure()


def test_an_unreadable_file_is_read_again_after_a_repair_that_keeps_size_and_time(root: Path, cache: Path) -> None:
    file = root / "train/ant/0.png"
    whole, about = file.read_bytes(), file.stat()
    for content in (whole[:-200] + bytes(200), whole):
        file.write_bytes(content)
        os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
        image_folder._known.clear()
        if content != whole:
            with refuses("data.root", str(root), "1 file cannot be read", kind=AgreedError):
                folder(root)
            assert not cache.exists()
    assert folder(root).class_counts == [8, 6, 4]


def test_without_a_home_directory_nothing_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert statistics.cache_directory(None) is None
    assert folder(root).class_counts == [8, 6, 4]
    with refuses("data.cache_dir", "~/x", "there is no home directory"):
        statistics.cache_directory("~/x")


def test_one_tree_is_split_by_class_and_seed_and_files_keep_their_part(tmp_path: Path) -> None:
    base = pictures(tmp_path / "tree", {"a": 20, "b": 40})
    parts = listing.find(base, 0.1, 0.2, 0).parts
    assert {name: len(files) for name, files in parts.items()} == {"train": 42, "val": 6, "test": 12}
    assert [sum(label for _, label in parts[name]) for name in ("train", "val", "test")] == [28, 4, 8]
    assert not set(parts["train"]) & set(parts["val"]) | set(parts["val"]) & set(parts["test"])
    assert listing.find(base, 0.1, 0.2, 0).parts == parts
    assert listing.find(base, 0.1, 0.2, 1).parts != parts
    moved = tmp_path / "elsewhere"
    shutil.copytree(base, moved)
    there = listing.find(moved, 0.1, 0.2, 0).parts
    assert [(os.path.relpath(p, moved), y) for p, y in there["test"]] == [
        (os.path.relpath(p, base), y) for p, y in parts["test"]
    ]
    pictures(base, {"a": 21})
    assert len(set(listing.find(base, 0.1, 0.2, 0).parts["test"]) & set(parts["test"])) >= 11
    whole = listing.find(base, 0.1, 0, 0).parts
    assert whole["test"] == whole["val"]


def test_train_without_val_is_split_and_test_is_kept(tmp_path: Path) -> None:
    base = pictures(tmp_path / "x", {"train/a": 10, "train/b": 10, "test/a": 2, "test/b": 3, ".cache/c": 1})
    found = listing.find(base, 0.2, 0.5, 0)
    assert {name: len(files) for name, files in found.parts.items()} == {"train": 16, "val": 4, "test": 5}
    shutil.move(base / "test", base / "validation")
    assert len(listing.find(base, 0.2, 0.5, 0).parts["val"]) == 5


def test_hidden_nested_linked_and_other_files(tmp_path: Path) -> None:
    base = pictures(tmp_path / "x", {"ä b": 2, "日本/deep/er": 3})
    shutil.copy(base / "ä b/0.png", base / "ä b/.hidden.png")
    shutil.copy(base / "ä b/0.png", base / "ä b/UPPER.PNG")
    (base / "ä b/notes.txt").write_text("no image", encoding="utf-8")
    (base / "loose.png").write_bytes((base / "ä b/0.png").read_bytes())
    (base / "日本/again").symlink_to(base / "日本")  # a circle
    (base / "ä b/link.png").symlink_to(base / "日本/deep/er/0.png")
    (base / ".git").mkdir()
    found = listing.find(base, 0.2, 0.2, 0)
    assert found.classes == ["ä b", "日本"]
    names = sorted(Path(path).name for files in found.parts.values() for path, _ in files)
    assert names == ["0.png", "0.png", "1.png", "1.png", "2.png", "UPPER.PNG", "link.png"]
    assert found.ignored == 1


def test_names_that_macos_decomposed_are_the_same_class(tmp_path: Path) -> None:
    base = pictures(tmp_path / "x", {"train/café": 2, "train/b": 2, "val/cafe\u0301": 1, "val/b": 1})
    assert listing.classes(base) == ["b", "café"]


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "has 0 class folders"),
        ({"a": 3}, "has 1 class folder;"),
        ({"a": 3, "b": 0}, "b has no image"),
        ({"train/a": 1, "train/b": 1, "val/a": 1}, "b is in one of them only"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/c": 1}, "b is in one of them only"),
    ],
)
def test_folders_that_cannot_be_classes_are_refused(tmp_path: Path, counts: dict[str, int], words: str) -> None:
    base = tmp_path / "x"
    base.mkdir()
    pictures(base, counts)
    with refuses("data.root", str(base), words):
        listing.classes(base)


def test_what_is_no_directory_or_has_other_suffixes_is_refused(tmp_path: Path) -> None:
    with refuses("data.root", None, "it is missing"):
        listing.classes(None)
    with refuses("data.root", "/nowhere", "there is no such directory"):
        listing.classes("/nowhere")
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    with refuses("data.root", file, "it is no directory"):
        listing.classes(file)
    base = pictures(tmp_path / "x", {"a": 2, "b": 0})
    (base / "b/0.heic").write_text("", encoding="utf-8")
    with refuses("data.root", str(base), "b has no image (1 file has another suffix)"):
        listing.classes(base)
    loose = tmp_path / "loose"
    pictures(tmp_path, {"loose": 3})
    with refuses("data.root", str(loose), "has 0 class folders, and 3 images in no class folder"):
        listing.classes(loose)


def test_shares_and_classes_that_are_too_small_are_refused(tmp_path: Path) -> None:
    base = pictures(tmp_path / "x", {"a": 20, "b": 1})
    with refuses("data.test_fraction", 0.1, "class b has too few images for this split (1)"):
        listing.find(base, 0.1, 0.1, 0)
    for val, test, setting in ((0, 0.1, "val_fraction"), (1, 0, "val_fraction"), (0.1, -1, "test_fraction")):
        with refuses(f"data.{setting}"):
            listing.find(base, val, test, 0)
    with refuses("data.val_fraction=0.5 and data.test_fraction", 0.5, "their sum must be below 1"):
        listing.find(base, 0.5, 0.5, 0)


def _save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_every_kind_of_pixel_becomes_8_bits_of_grey_or_colour(tmp_path: Path) -> None:
    deep = np.full((2, 2), 0x80FF, dtype=np.uint16)
    grey = _save(tmp_path / "16.png", Image.fromarray(deep))
    assert np.asarray(open_image(grey, 1)).tolist() == [[128, 128]] * 2
    assert np.asarray(open_image(grey, 3))[0, 0].tolist() == [128, 128, 128]
    dark = np.full((2, 2), 255, dtype=np.uint16)  # not 8 bits, although all values would fit
    for name in ("dark.png", "dark.tif"):
        assert np.asarray(open_image(_save(tmp_path / name, Image.fromarray(dark)), 1)).tolist() == [[0, 0]] * 2
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 2 65535\n" + dark.astype(">u2").tobytes())
    assert np.asarray(open_image(tmp_path / "dark.pgm", 1)).tolist() == [[0, 0]] * 2
    for value in (-1, 65536):
        with pytest.raises(OSError, match="32-bit integers"):
            open_image(_save(tmp_path / "i.tif", Image.fromarray(np.full((2, 2), value, dtype=np.int32))), 1)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert np.asarray(open_image(_save(tmp_path / "p.gif", palette), 3))[0, 0].tolist() == [10, 20, 30]
    alpha = _save(tmp_path / "a.png", Image.new("RGBA", (2, 2), (10, 20, 30, 0)))
    assert np.asarray(open_image(alpha, 3))[0, 0].tolist() == [10, 20, 30]  # transparency is dropped
    inks = _save(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 0, 0, 255)))
    assert np.asarray(open_image(inks, 3)).max() < 5
    bits = _save(tmp_path / "1.png", Image.new("1", (2, 2), 1))
    assert np.asarray(open_image(bits, 1)).tolist() == [[255, 255]] * 2
    with pytest.raises(OSError, match="32-bit floats"):
        open_image(_save(tmp_path / "f.tif", Image.new("F", (2, 2), 0.5)), 1)


def test_the_orientation_of_the_camera_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    wide = Image.new("RGB", (8, 4))
    assert open_image(_save(tmp_path / "x.jpg", wide, exif=exif), 3).size == (4, 8)
    assert as_tensor(open_image(_save(tmp_path / "y.jpg", wide), 3)).shape == (3, 4, 8)


def test_images_are_scaled_to_cover_and_cropped_in_the_middle() -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((200, 0, 0), (15, 0, 25, 20))
    out = fitted(image, (10, 10), 1.0)
    assert out.size == (10, 10)
    assert out.getpixel((5, 5)) == (200, 0, 0)
    assert fitted(image, (20, 40), 0.875) is image  # of that size already
    assert fitted(image, (10, 10), 0.5).size == (10, 10)
    assert fitted(Image.new("L", (1, 100)), (10, 10), 0.875).size == (10, 10)


def test_all_unreadable_files_are_named_before_training_or_skipped(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, cut = root / "train/ant/0.png", root / "train/bee/1.png"
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-200])
    with refuses("data.root", str(root), "2 files cannot be read", "use data.unreadable=skip", kind=AgreedError):
        folder(root)
    out = capsys.readouterr().out
    assert f"cannot be read: {empty} (UnidentifiedImageError" in out
    assert f"cannot be read: {cut} (OSError: " in out
    data = folder(root, unreadable="skip")
    assert data.class_counts == [7, 5, 4]
    assert str(empty) not in [path for path, _ in data.listing.parts["train"]]
    assert "2 files are left out" in capsys.readouterr().out
    assert len(data.about()["unreadable"]) == 2
    for path in root.glob("train/cat/*"):
        path.write_bytes(b"")
    with refuses("data.unreadable", "skip", "no training image of class cat is left", kind=AgreedError):
        folder(root, unreadable="skip")


def test_a_broken_link_is_an_unreadable_file(root: Path) -> None:
    (root / "train/ant/link.png").symlink_to(root / "nowhere.png")
    with refuses("data.root", str(root), "1 file cannot be read, such as link.png", kind=AgreedError):
        folder(root)
    assert folder(root, unreadable="skip").class_counts == [8, 6, 4]


def test_only_the_formats_of_the_suffixes_are_read(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    postscript, icon = tmp_path / "e.jpg", tmp_path / "i.png"
    image.save(postscript, format="EPS")
    image.save(icon, format="ICNS")
    for path in (postscript, icon):
        with pytest.raises(OSError, match="cannot identify"):
            open_image(path, 3)
        with pytest.raises(OSError, match="cannot identify"):
            is_colour(path)
    camera = tmp_path / "two.jpg"
    image.save(camera, format="MPO", save_all=True, append_images=[image])
    with Image.open(camera) as held:
        assert held.format == "MPO"
    assert open_image(camera, 3).size == (4, 4)
    assert is_colour(camera)


def test_colours_are_found_and_grey_that_was_found_too_early_is_refused(tmp_path: Path) -> None:
    base = pictures(tmp_path / "x", {"a": 80, "b": 80}, colour=False)
    assert listing.facts(base, None) == {"num_classes": 2, "in_channels": 1}
    data = folder(base)
    assert next(iter(data.val_dataloader()))[0].shape[1:] == (1, 12, 12)
    Image.new("RGB", (12, 12), (9, 1, 1)).save(base / "b/99.png")  # behind the images that are probed
    with refuses("data.channels", None, "some images have colours, such as", "99.png", kind=AgreedError):
        folder(base)
    assert folder(base, channels=1).in_channels == 1
    assert folder(base, channels=3).in_channels == 3
    with refuses("data.channels", 2, "use 1 (grey), 3 (colour)"):
        listing.facts(base, 2)


def test_the_size_is_that_of_all_images_or_224(root: Path) -> None:
    assert folder(root).size == (12, 12)
    pictures(root / "train", {"ant": 1}, size=(9, 12))
    data = folder(root)
    assert data.size == (224, 224)
    given = {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert folder(root, size=[8, 10], **given).image_set("val")[0][0].shape == (3, 8, 10)
    for wrong in (0, -1, [1], "x", 1.5):
        with refuses("data.size", wrong):
            folder(root, size=wrong)


def test_a_crop_is_a_share(root: Path) -> None:
    for wrong in (0, 1.5, "x"):
        with refuses("data.crop_pct", wrong, "use a share above 0 and up to 1"):
            folder(root, crop_pct=wrong)


def test_given_statistics_are_used_and_checked(root: Path) -> None:
    assert folder(root, mean="imagenet").std == [0.229, 0.224, 0.225]
    assert folder(root, mean=[0, 0, 0], std=[1, 1, 1]).mean == [0, 0, 0]
    for mean, std, setting in (([0.5], [1], "mean"), ([0, 0, 0], None, "std"), ([0, 0, 0], [1, 1, 0], "std")):
        with refuses(f"data.{setting}"):
            folder(root, mean=mean, std=std)


def test_a_checkpoint_keeps_classes_and_normalization(root: Path) -> None:
    first = folder(root)
    first.settle_statistics()
    state = first.state_dict()
    pictures(root / "train", {"ant": 9}, seed=7)
    other = folder(root)
    other.load_state_dict(state)
    other.settle_statistics()
    assert (other.mean, other.std) == (first.mean, first.std)
    shutil.move(root / "train/cat", root / "train/dog")
    shutil.move(root / "val/cat", root / "val/dog")
    with refuses("data", None, "had other classes (cat differs)", kind=AgreedError):
        folder(root).load_state_dict(state)


def test_a_checkpoint_keeps_size_crop_and_channels(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = folder(root, size=8, crop_pct=1.0, channels=1)
    first.settle_statistics()
    state = first.state_dict()
    pictures(root / "val", {"ant": 1}, size=(9, 12))  # null would be 224x224 now
    other = folder(root)
    capsys.readouterr()
    other.load_state_dict(state)
    line = "taken from the checkpoint: data.size=8 data.crop_pct=1.0 data.channels=1"
    assert line in capsys.readouterr().out
    for part in ("train", "val"):
        pairs = zip(*(list(data.image_set(part)) for data in (first, other)), strict=False)
        assert all(torch.equal(x[0], y[0]) for x, y in list(pairs)[1:])
    folder(root, size=8, crop_pct=1.0, channels=1).load_state_dict(state)
    assert "taken from" not in capsys.readouterr().out
    for setting, value in (("size", 12), ("crop_pct", 0.5), ("channels", 3)):
        with refuses(f"data.{setting}", str(value), "the checkpoint's run had", kind=AgreedError):
            folder(root, **{setting: value}).load_state_dict(state)
    with refuses("data.size", "[8,10]", "the checkpoint's run had 8", kind=AgreedError):
        folder(root, size=[8, 10]).load_state_dict(state)
    older = {name: value for name, value in state.items() if name not in ("size", "crop_pct", "channels")}
    folder(root, size=12).load_state_dict(older)  # the checkpoint of an earlier version


def test_the_final_weights_of_a_resumed_fit_are_tested_with_the_same_input(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_folder, "_resumed", {})
    first = folder(root)
    first.settle_statistics()
    pictures(root / "val", {"ant": 1}, size=(9, 12))
    fitted, tested = folder(root), folder(root)
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    fitted.trainer = SimpleNamespace(state=state, is_global_zero=True)  # type: ignore[assignment]
    fitted.load_state_dict(first.state_dict())
    tested.setup("test")
    assert (tested.size, tested.mean) == (fitted.size, fitted.mean) == ((12, 12), first.mean)
    assert capsys.readouterr().out.count("taken from the checkpoint: data.size=12") == 1


def test_a_cache_that_no_memory_can_hold_is_refused(root: Path) -> None:
    for wrong in (0, -1, 1e-9, float("inf"), float("nan"), "x"):
        with refuses("data.cache", wrong if wrong == wrong else ANY, "use a number of GiB"):
            folder(root, cache=wrong)
    assert folder(root, cache=image_folder.SMALLEST).val_dataloader() is not None
    for wrong in (1e8, 1e30):
        with refuses("data.cache", wrong, "no such memory", "use fewer GiB"):
            folder(root, cache=wrong).val_dataloader()


def test_the_cache_returns_what_was_decoded_and_stays_within_its_bytes(root: Path) -> None:
    plain, cached = folder(root), folder(root, cache=0.001, num_workers=2)
    for epoch in range(2):
        pairs = []
        for data in (plain, cached):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            pairs.append(torch.cat([x for x, _ in loader]))
        assert torch.equal(*pairs)
    memory = cached._caches["train"]
    assert memory.used() == (18 * 12 * 12 * 3, 18) or memory.used()[1] >= 16  # filled by the workers, read here
    small = image_folder.ImageCache(3, 100)
    images = [torch.full((1, 7, 7), n, dtype=torch.uint8) for n in range(3)]
    assert [small.get(n, lambda n=n: images[n]).unique().tolist() for n in (0, 1, 2, 0)] == [[0], [1], [2], [0]]
    assert small.used() == (98, 2)
    assert small.get(0, lambda: pytest.fail("decoded again")).equal(images[0])


def test_settings_of_a_folder_are_filled_in_before_ranks_start(root: Path) -> None:
    cfg = OmegaConf.create(
        {"_target_": "syncbn.training.ImageFolder", "root": str(root), "channels": None, "num_classes": None}
    )
    data_settings.fill(cfg)
    assert (cfg.num_classes, cfg.in_channels) == (3, 3)
    cfg.val_fraction = 1.5
    with refuses("data.val_fraction", 1.5, "use a share above 0 and below 1"):
        data_settings.fill(cfg)
    cfg.val_fraction, cfg.num_classes = 0.1, 4
    with refuses("data.num_classes", 4, "has 3 class folders; leave it out"):
        data_settings.fill(cfg)
    mine = OmegaConf.create({"_target_": "mine.Data", "root": "${oc.env:NO_SUCH_VARIABLE}"})
    data_settings.fill(mine)
    assert "num_classes" not in mine


def test_loader_options() -> None:
    assert loaders.loader_options(0)["num_workers"] == 0
    assert loaders.loader_options(2, prefetch_factor=4) == {
        "num_workers": 2,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": True,
        "prefetch_factor": 4,
    }
    with refuses("data.prefetch_factor", 2, "data.num_workers=0 loads in the training process"):
        loaders.loader_options(0, prefetch_factor=2)
    with refuses("data.num_workers", -1):
        loaders.loader_options(-1)


def test_a_file_that_is_no_image_behind_the_suffix_of_one_is_named(root: Path) -> None:
    """A file that is no image behind an image's suffix is named with the others."""
    (root / "val/ant/x.jpg").write_bytes(b"no image")
    with refuses("data.root", str(root), "1 file cannot be read, such as x.jpg", kind=AgreedError):
        folder(root)
