"""``syncbn predict``: every image once, in order, with the classes that the run's own test has found."""

import csv
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from syncbn.inference.prediction import predict as in_ranks
from syncbn.inference.prediction.command import predict
from syncbn.inference.prediction.options import Options
from syncbn.inference.prediction.share import Task, rows
from syncbn.inference.trained import Trained, open_run
from syncbn.training.data.digits import Digits
from syncbn.training.models import networks
from syncbn.training.norm.replace import prepare_model
from tests.inference.support.crafted_runs import HERE, Adds, Head, crafted, seen_something
from tests.inference.support.pictures import a_seven
from tests.support.refuses import refuses
from tests.training.data.support.pictures import pictures
from tests.training.support import train_command
from tests.training.support.train_command import Run

CLASSES = ("a cat", "dog", "étoile", "=fox")
SETTINGS = ("data=folder", "model=resnet", "model.width=4", "trainer.max_epochs=1", "logger=csv", "trainer.devices=1")


def syncbn(where: Path, *arguments: str, **options: Any) -> Run:
    command = sys.executable, "-m", "syncbn", *arguments
    return train_command.run(where, *command, env=train_command.environment(), **({"timeout": 120} | options))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, ``outputs/a``, on folders of images, with ``images/test``; of other sizes than those of the training."""
    where = tmp_path_factory.mktemp("predict")
    for part, size, count in (("train", (12, 12), 24), ("val", (12, 12), 4), ("test", (15, 20), 9)):
        pictures(where / "images" / part, dict.fromkeys(CLASSES, count), size=size, seed=len(part))
    deeper = where / "images/test/dog/more"
    pictures(deeper.parent, {"more": 3})
    settings = f"data.root={where}/images", "run.id=a", f"data.cache_dir={where}/cache", "data.num_workers=0"
    train_command.train(where, *SETTINGS, *settings).ended()
    return where


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Callable[..., list[dict[str, str]]]:
    """The rows of the CSV that ``predict`` writes in this process."""

    def predicted(*given: Path, **options: Any) -> list[dict[str, str]]:
        out = tmp_path / "out.csv"
        predict(place / "outputs/a", given, Options(**{"out": out, "devices": 1} | options))
        return table(out)

    return predicted


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def accuracy(found: list[dict[str, str]]) -> float:
    right = [row["class"] == Path(row["file"].partition("/test/")[2]).parts[0] for row in found]
    return sum(right) / len(right)


def test_over_ranks_with_the_accuracy_of_the_runs_test(place: Path, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "two.csv"
    done = syncbn(place, "predict", "outputs/a", "images/test", f"--out={out}", "--batch-size=5").ended()
    assert (done.out, done.err, done.left) == (f"39 images: {out}\n", "", [])
    found = table(out)
    files = [row["file"] for row in found]
    assert files == sorted(files, key=lambda each: (Path(each).parent, Path(each).name))
    assert {*files} == {str(path.relative_to(place)) for path in place.glob("images/test/**/*.png")}
    expected = train_command.Run(0, "", "", place / "outputs/a", []).json("result")["test"]
    assert accuracy(found) == pytest.approx(expected["test/acc"], abs=1e-6)
    assert 0.3 < accuracy(found) < 1  # a test of all zeros or all ones would prove little
    alone = run(place / "images/test", batch_size=5)
    assert [row["class"] for row in alone] == [row["class"] for row in found]
    for one, other in zip(alone, found, strict=True):
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)


@pytest.mark.parametrize("norm", ["sync", "group_norm", "none"])
def test_digits_are_those_of_the_data_and_no_image_changes_another(tmp_path: Path, norm: str) -> None:
    settings = {"name": norm, "num_groups": 4, "min_channels": 1, "only": None}
    torch.manual_seed(0)
    network = networks.ResNet(width=4)
    prepare_model(network, settings)
    model = {"_target_": "syncbn.training.ResNet", "in_channels": 1, "num_classes": 10, "width": 4}
    run = crafted(tmp_path / "run", seen_something(network, 1, 8, 8), model, norm=settings)
    data = Digits()
    data.setup("test")
    images = data.test.tensors[0][:20]
    (tmp_path / "in").mkdir()
    for number, image in enumerate(images):
        pixels = (image[0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"in/{number:02}.png")
    with torch.no_grad():
        expected = network.eval()(images).softmax(1)
    for size in (1, 7):
        predict(run, [tmp_path / "in"], Options(tmp_path / "out.csv", batch_size=size, devices=1))
        found = table(tmp_path / "out.csv")
        # A pixel of v/16 is rounded to 8 bits.
        assert [float(row["probability"]) for row in found] == pytest.approx(expected.amax(1).tolist(), abs=0.01)
        assert sum(int(row["class"]) == each for row, each in zip(found, expected.argmax(1), strict=True)) >= 19


def test_the_most_probable_classes(place: Path, run: Any) -> None:
    (row,) = run(next((place / "images/test/dog").glob("*.png")), top=4)
    names = [row[name] for name in ("class", "class_2", "class_3", "class_4")]
    shares = [float(row[name]) for name in ("probability", "probability_2", "probability_3", "probability_4")]
    assert sorted(names) == sorted(CLASSES)
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    with refuses("--top", 5, "4 classes"):
        run(place / "images/test", top=5)


def test_what_cannot_be_read_is_reported_and_the_rest_is_predicted(
    place: Path, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "in", {"x": 3})
    whole = (folder / "x/0.png").read_bytes()
    (folder / "x/cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "x/empty.jpg").touch()
    (folder / "x/text.png").write_text("no image", encoding="utf-8")
    (folder / "x/gone.png").symlink_to("nothing")
    (folder / "x/notes.txt").write_text("ignored", encoding="utf-8")
    (folder / "x/.hidden.png").write_bytes(whole)
    os.mkfifo(folder / "x/pipe.png")
    found = run(folder)
    assert [Path(row["file"]).name for row in found] == ["0.png", "1.png", "2.png"]
    printed = capsys.readouterr()
    assert [line.split(" (")[0].rpartition("/")[2] for line in printed.err.splitlines()] == [
        *("cut.png", "empty.jpg", "gone.png", "pipe.png", "text.png")
    ]
    assert printed.out == f"3 images: {tmp_path}/out.csv; 1 files with other suffixes were ignored\n"
    done = syncbn(tmp_path, "predict", str(place / "outputs/a"), "in", "--devices=1").ended(1)
    assert done.err.splitlines()[-1] == "error: 5 files were left out: see above"
    assert [line.partition(",")[0] for line in done.out.splitlines()] == ["file", *(f"in/x/{n}.png" for n in range(3))]


def test_every_kind_of_image_and_odd_names(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (9, 7, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    for name in ("a\nb.png", 'quote",.png', "=1+1.png", os.fsdecode(b"\xff.png"), "-x.png"):
        image.save(name)
    for mode in ("L", "P", "1", "LA"):
        image.convert(mode).save(f"{mode}.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) << 8).save("16.png")
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    found = run(*map(Path, names), Path("L.png"), tmp_path / "L.png")
    assert [Path(row["file"]).name for row in found] == names
    assert {row["file"] for row in found} >= {"./=1+1.png", "./-x.png", "a\nb.png"}
    lines = [name for name in names if "\n" not in name]
    Path("list.txt").write_bytes("\n".join(lines).encode(errors="surrogateescape") + b"\n\n")
    assert [row["file"].removeprefix("./") for row in run(files_from=Path("list.txt"))] == lines


def test_a_batch_does_not_change_a_prediction(place: Path) -> None:
    paths = [str(path) for path in sorted((place / "images/test").rglob("*.png"))][:7]
    trained = open_run(place / "outputs/a")
    one, all_of_them = (list(rows(Task("", paths, size, 4, False, "cpu", 1), trained)) for size in (1, 7))
    for alone, together in zip(one, all_of_them, strict=True):
        assert alone.classes == together.classes
        assert alone.probabilities == pytest.approx(together.probabilities, abs=1e-6)
    of_ranks = [list(rows(Task("", paths, 2, 4, False, "cpu", 1), trained, rank, 3)) for rank in range(3)]
    assert sorted(row.file for each in of_ranks for row in each) == list(range(7))


def test_a_file_that_was_there_stays_if_it_fails(
    place: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.csv").write_text("before", encoding="utf-8")

    def broken(*_: Any) -> Iterator[Any]:
        raise RuntimeError("broken")
        yield

    monkeypatch.setattr(in_ranks, "rows", broken)
    with pytest.raises(RuntimeError, match="broken"):
        run(place / "images/test")
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_network_that_fits_no_images(place: Path) -> None:
    good = open_run(place / "outputs/a")
    paths = [str(next((place / "images/test").rglob("*.png")))]
    for network, words in ((torch.nn.Linear(3, 4), "does not take"), (torch.nn.Conv2d(3, 4, 3), "one score")):
        trained = Trained(network, {}, None, good.preprocessing, good.checkpoint, None)
        with refuses("RUN", None, words):
            list(rows(Task("", paths, 2, 1, False, "cpu", 1), trained))


def test_the_layers_that_a_module_adds_to_its_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The network alone has other predictions than the module: it is said, and the whole module can be asked for."""
    torch.manual_seed(0)
    lit, head = Adds(Head()), {"_target_": f"{HERE}.Head"}
    module = {"_target_": f"{HERE}.Adds", "network": head}
    run = crafted(tmp_path / "run", lit, head, prefix="", module=module)
    x = open_run(run, trust=True).preprocessing(a_seven(tmp_path / "seven.png"))  # type: ignore[misc]
    for part, network in ((None, lit.network), ("", lit)):
        out = tmp_path / "out.csv"
        predict(run, [tmp_path / "seven.png"], Options(out, devices=1, trust=True, part=part))
        expected = network.eval()(x[None]).softmax(1).detach()
        (row,) = table(out)
        assert int(row["class"]) == expected.argmax()
        assert float(row["probability"]) == pytest.approx(float(expected.max()), abs=1e-5)
        assert ("weights outside of its network Head" in capsys.readouterr().err) == (part is None)


def test_mistakes_are_one_line(place: Path, run: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/readme.md").touch()
    with refuses("FOLDER", str(tmp_path / "empty"), "no image", "1 file has another suffix"):
        run(tmp_path / "empty")
    with refuses("FOLDER", str(tmp_path / "gone"), "no such file"):
        run(tmp_path / "gone")
    with refuses("--out", tmp_path, "directory"):
        run(place / "images/test", out=tmp_path)
    with refuses("--out", tmp_path / "no/out.csv", f"there is no directory {tmp_path}/no; make it"):
        run(place / "images/test", out=tmp_path / "no/out.csv")
    with refuses("--devices", 1000, "use 1 to"):
        run(place / "images/test", devices=1000)
    with refuses("--files-from", tmp_path / "gone", "No such file"):
        run(files_from=tmp_path / "gone")
    with refuses(str(place / "images"), None, "no run directory"):
        predict(place / "images", [place / "images/test"], Options(devices=1))


def test_a_signal_ends_the_ranks_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    first = next((place / "images/test").rglob("*.png"))
    for number in range(3000):
        (many / f"{number}.png").symlink_to(first)

    def interrupt(leader: int) -> None:
        while not (tmp_path / ".out.csv").exists():
            time.sleep(0.01)
        os.kill(leader, signal.SIGINT)

    arguments = "predict", str(place / "outputs/a"), "many", "--out=out.csv", "--batch-size=1"
    done = syncbn(tmp_path, *arguments, meanwhile=interrupt).ended(130)
    assert done.err == "error: stopped by SIGINT; no file was written\n"
    assert done.left == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many"]
