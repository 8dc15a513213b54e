"""The pictures of a test: the confusion of classes, and the worst mistakes over all ranks."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from syncbn.training.evaluation.prediction_record import WORST, Mistakes, PredictionRecord
from syncbn.training.plots import confusion, of_test
from syncbn.training.plots.mistakes import Normalization
from tests.support.ranks import Ranks

SHARES = (0, 300, 301, 500)


def samples(classes: int = 10, number: int = 500, channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (number,), generator=generator)
    scores = torch.randn(number, classes, generator=generator)
    scores[torch.arange(number), target] += 2
    return scores, target, torch.rand(number, channels, 8, 8, generator=generator)


def record(scores: Tensor, target: Tensor, images: Tensor, *, world_size: int = 1, rank: int = 0) -> PredictionRecord:
    found, trainer = PredictionRecord(), SimpleNamespace(world_size=world_size, is_global_zero=rank == 0)
    for at in range(0, len(target) + 1, 32):
        part = slice(at, at + 32)
        outputs = {"scores": scores[part], "target": target[part]}
        found.on_test_batch_end(trainer, None, outputs, (images[part], target[part]))  # type: ignore[arg-type]
    found.on_test_epoch_end(trainer, None)  # type: ignore[arg-type]
    return found


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def on_a_rank(rank: int, world_size: int) -> tuple[Tensor | None, Mistakes | None]:
    mine = slice(SHARES[rank], SHARES[rank + 1])
    found = record(*(each[mine] for each in samples()), world_size=world_size, rank=rank)
    return found.pairs, found.mistakes


def test_over_ranks_every_sample_counts_once_and_the_worst_are_those_of_all(ranks: Ranks) -> None:
    scores, target, images = samples()
    (pairs, mistakes), *others = ranks.run(on_a_rank, world_size=3)
    assert others == [(None, None)] * 2
    matrix = torch.zeros(10, 10, dtype=torch.long)
    for cell in confusion.cells(pairs):
        matrix[cell.true, cell.predicted] = cell.samples
    assert torch.equal(matrix, multiclass_confusion_matrix(scores, target, num_classes=10))
    losses = F.cross_entropy(scores, target, reduction="none")
    losses[scores.argmax(1) == target] = -1
    worst = losses.argsort(descending=True)[:WORST]
    assert torch.equal(mistakes.losses, losses[worst])
    assert torch.equal(mistakes.images, images[worst])
    assert torch.equal(mistakes.true, target[worst])
    assert torch.equal(mistakes.predicted, scores[worst].argmax(1))
    assert torch.equal(mistakes.probabilities, scores.softmax(1)[worst].amax(1))


def test_data_of_other_kinds_have_a_confusion_matrix_and_no_images() -> None:
    scores, target, _ = samples()
    assert record(scores, target, torch.rand(500, 64)).mistakes is None
    trainer: Any = SimpleNamespace(world_size=1, is_global_zero=True)
    found = PredictionRecord()
    for outputs in (None, torch.zeros(()), {"preds": torch.zeros(3), "target": torch.zeros(3)}):
        found.on_test_batch_end(trainer, None, outputs, None)  # type: ignore[arg-type]
    found.on_test_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert (found.pairs, found.mistakes) == (None, None)


def test_batches_of_images_of_different_sizes() -> None:
    scores, target = torch.eye(4)[[1, 2, 3, 0]], torch.arange(4)
    found, trainer = PredictionRecord(), SimpleNamespace(world_size=1, is_global_zero=True)
    for part, side in ((slice(0, 2), 8), (slice(2, 4), 6)):
        outputs = {"scores": scores[part], "target": target[part]}
        found.on_test_batch_end(trainer, None, outputs, (torch.rand(2, 3, side, side), None))  # type: ignore[arg-type]
    found.on_test_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert found.mistakes is not None
    assert found.mistakes.images.shape == (4, 3, 8, 8)


def test_the_pictures_of_few_and_many_classes(tmp_path: Path) -> None:
    sizes = {}
    for classes, channels in ((3, 1), (40, 3), (100, 3), (300, 3)):
        directory = tmp_path / str(classes)
        directory.mkdir()
        names = [f"中 class $x_{number}$ with a long name\n\x1b" for number in range(classes)]
        data = SimpleNamespace(classes=names, mean=[0.5] * 3, std=[0.2] * 3)
        of_test.write_test(directory, record(*samples(classes, channels=channels)), data)
        sizes[classes] = size(directory / "confusion.png")
        assert size(directory / "mistakes.png")[0] > 1000
        with (directory / "confusion.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert sum(int(row["samples"]) for row in rows) == 500
        assert rows[0]["true"] == names[0]
    assert sizes[40][0] > sizes[3][0]
    assert sizes[300][0] < sizes[100][0]  # pairs alone


def test_files_of_an_earlier_attempt_do_not_stay(tmp_path: Path) -> None:
    scores, target, images = samples()
    of_test.write_test(tmp_path, record(scores, target, images), None)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"confusion.csv", "confusion.png", "mistakes.png"}
    of_test.write_test(tmp_path, record(F.one_hot(target).float(), target, images), None)  # no mistake
    assert {path.name for path in tmp_path.iterdir()} == names - {"mistakes.png"}
    of_test.write_test(tmp_path, PredictionRecord(), None)
    assert not list(tmp_path.iterdir())


def test_normalization_is_undone() -> None:
    image = torch.rand(3, 4, 4)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    data = SimpleNamespace(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    assert torch.allclose(Normalization(data).undo((image - mean) / std), image, atol=1e-6)
    for unknown in (None, SimpleNamespace(mean="imagenet", std=None), SimpleNamespace(mean=[0.5], std=[0.5])):
        assert torch.equal(Normalization(unknown).undo(image), image)  # values in [0, 1] are shown as they are
        scaled = Normalization(unknown).undo(9 * image - 4)
        assert (scaled.min(), scaled.max()) == (0, pytest.approx(1))
    assert Normalization(None).undo(torch.full((1, 2, 2), float("nan"))).isfinite().all()


def test_the_pairs_of_a_matrix() -> None:
    matrix = torch.tensor([[2, 1], [0, 3]])
    assert confusion.pairs_of(matrix).tolist() == [[0, 0], [0, 0], [0, 1], [1, 1], [1, 1], [1, 1]]


def test_labels_of_other_integer_types_count_and_unlabelled_samples_do_not() -> None:
    scores, target, images = samples()
    target[[3, 40]] = -100  # torch's cross_entropy ignores it by default
    found, kept = record(scores, target.int(), images), target >= 0
    expected = record(scores[kept], target[kept], images[kept])
    assert found.pairs is not None
    assert found.mistakes is not None
    assert expected.mistakes is not None
    assert len(found.pairs) == 498
    assert all(torch.equal(*pair) for pair in zip(found.mistakes, expected.mistakes, strict=True))
