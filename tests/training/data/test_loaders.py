"""The loaders: where they stand, what samples draw, and what is said of a sample that cannot be read."""

import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from syncbn.training import data
from syncbn.training.data import batches, loaders
from syncbn.training.data.batches import SampleError
from syncbn.training.data.loaders import TrainLoader, exact_loader, train_loader
from syncbn.training.data.samplers import ExactSampler
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import quiet_trainer

SAMPLES, GLOBAL, EPOCHS = 22, 4, 3  # five global batches and two samples


class Augmented(Dataset[Any]):
    """Each sample is its index and what was drawn for it, from all three generators."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[int, Tensor, float, float]:
        return index, torch.rand(2), random.random(), np.random.rand()


class Images(Dataset[Any]):
    """As torchvision's ImageFolder: a list of (path, class)."""

    def __init__(self, paths: list[Path]) -> None:
        self.samples = [(str(path), 0) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.samples[index][0]) as image:
            return torch.from_numpy(np.array(image))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds a rank's loader without a process group."""

    def loader(ranks: int, rank: int, dataset: Dataset[Any] | None = None, **options: Any) -> TrainLoader:
        monkeypatch.setattr(loaders, "world_size", lambda: ranks)
        monkeypatch.setattr(loaders, "this_rank", lambda: rank)
        return train_loader(dataset or Augmented(), GLOBAL // ranks, **{"seed": 3, **options})

    return loader


def plain(batch: Any) -> list[Any]:
    return [leaf.tolist() for leaf in batch]


def rows(batch: Any) -> list[Any]:
    return list(zip(*batch, strict=True))


def epochs(loader: TrainLoader, first: int = 0) -> Iterator[list[Any]]:
    """As Lightning goes about it: ``iter()``, and only then the epoch, the first time; later the other way round."""
    iterator = iter(loader)
    for epoch in range(first, EPOCHS):
        loader.sampler.set_epoch(epoch)
        if epoch > first:
            iterator = iter(loader)
        yield from map(plain, iterator)


@pytest.mark.parametrize("remainder", ["drop", "pad", "uneven"])
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_resumed_run_gets_what_an_uninterrupted_one_gets(
    world: Any, workers: int, persistent: bool, ranks: int, rank: int, remainder: str
) -> None:
    straight = list(epochs(world(ranks, rank, remainder=remainder)))
    per_epoch = 5 if remainder == "drop" else 6
    assert len(straight) == per_epoch * EPOCHS
    options = {"num_workers": workers, "persistent_workers": persistent, "remainder": remainder}
    # Workers take their time to start: a few positions will do, the ends of an epoch among them.
    for done in (1, per_epoch - 1, per_epoch, 2 * per_epoch - 2) if workers else range(per_epoch * EPOCHS):
        first = world(ranks, rank, **options)
        before = list(islice(epochs(first), done))
        state = first.state_dict()
        assert (state["epoch"], state["batch"]) == divmod(done, per_epoch)
        second = world(ranks, rank, **options)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert len(second) == per_epoch
        assert before + list(epochs(second, state["epoch"])) == straight


def test_a_position_holds_on_another_number_of_ranks(world: Any) -> None:
    one = world(1, 0)
    list(islice(epochs(one), 7))
    rest = []
    for rank in range(2):
        two = world(2, rank)
        two.load_state_dict(one.state_dict())
        rest.append(list(epochs(two, 1)))
    assert len(rest[0]) == len(rest[1]) == 8
    for first, second, whole in zip(*rest, list(epochs(world(1, 0)))[7:], strict=True):
        assert sorted([*rows(first), *rows(second)]) == sorted(rows(whole))  # samples, and what was drawn for them


def test_another_epoch_than_the_one_that_was_broken_off_starts_at_its_begin(world: Any) -> None:
    """As with trainer.limit_train_batches: the checkpoint at the epoch's end stands in the middle of the data."""
    loader, whole = world(1, 0), list(epochs(world(1, 0)))
    assert list(islice(epochs(loader), 2)) == whole[:2]
    assert loader.state_dict() == {"epoch": 0, "batch": 2}
    resumed = world(1, 0)
    resumed.load_state_dict(loader.state_dict())
    for each in (loader, resumed):
        iterator = iter(each)
        each.sampler.set_epoch(1)
        assert each.state_dict() == {"epoch": 1, "batch": 0}
        assert list(map(plain, iterator)) == whole[5:10]


def test_only_the_next_iteration_goes_on(world: Any) -> None:
    loader, whole = world(1, 0), list(epochs(world(1, 0)))
    loader.load_state_dict({"epoch": 1, "batch": 3})
    assert plain(next(iter(loader))) == whole[8]
    assert plain(next(iter(loader))) == whole[5]
    assert loader.state_dict() == {"epoch": 1, "batch": 1}


def test_without_set_epoch_epochs_follow_each_other(world: Any) -> None:
    loader = world(1, 0)
    assert [plain(batch) for _ in range(EPOCHS) for batch in loader] == list(epochs(world(1, 0)))


@pytest.mark.parametrize("batch", [-1, 5, 17])
def test_a_position_that_an_epoch_does_not_have_is_refused(world: Any, batch: int) -> None:
    with refuses("data.batch_size", None, f" at batch {batch} of an epoch, but an epoch has 5 of 4 samples; use "):
        world(1, 0).load_state_dict({"epoch": 0, "batch": batch})


def test_another_fit_with_the_same_loader_begins_with_the_first_epoch(world: Any) -> None:
    loader = world(1, 0)
    for _ in range(2):
        loader.sampler.set_epoch(0)
        assert list(map(plain, loader)) == list(epochs(world(1, 0)))[:5]


class Recorder(pl.LightningModule):
    """Learns nothing to speak of, and writes down what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.got = nn.Linear(2, 1), []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batches = [*batch.values()] if isinstance(batch, dict) else [batch]
        self.got.append((self.current_epoch, batch_idx, [plain(each) for each in batches]))
        return self.layer(batches[0][1]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(loaders: Any, tmp_path: Path, checkpoint: Path | None = None, limit: float = 1.0) -> list[Any]:
    """What a fit got; one from the start saves ``step=*.ckpt``, and ``end-step=*.ckpt`` after each epoch."""
    module = Recorder()
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
    ends = ModelCheckpoint(tmp_path, "end-{step}", save_on_train_epoch_end=True, save_top_k=-1)
    options = {"max_epochs": EPOCHS, "limit_train_batches": limit, "enable_checkpointing": checkpoint is None}
    trainer = quiet_trainer(*([] if checkpoint else [every, ends]), **options)
    trainer.fit(module, loaders, ckpt_path=checkpoint, weights_only=True)
    return module.got


quiet = pytest.mark.filterwarnings(
    "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning",
    "ignore:.*LeafSpec.* is deprecated",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Checkpoint directory .* exists and is not empty",
)


@quiet
@pytest.mark.parametrize(("workers", "limit", "steps"), [(0, 5, range(1, 15)), (2, 5, (3, 5, 8)), (0, 3, range(1, 9))])
def test_lightning_goes_on_in_the_middle_of_an_epoch(
    tmp_path: Path, world: Any, workers: int, limit: int, steps: Any
) -> None:
    def run(checkpoint: Path | None = None) -> list[Any]:
        return fit(world(1, 0, num_workers=workers), tmp_path, checkpoint, limit)

    straight = run()
    assert len(straight) == limit * EPOCHS
    for step in steps:
        assert run(tmp_path / f"step={step}.ckpt") == straight[step:], step
    for step in range(limit, len(straight), limit):
        assert run(tmp_path / f"end-step={step}.ckpt") == straight[step:], step


@quiet
@pytest.mark.parametrize(
    ("mode", "shorter", "per_epoch"), [("max_size_cycle", 2, 5), ("max_size_cycle", 3, 5), ("min_size", 3, 3)]
)
def test_lightning_goes_on_with_loaders_of_unequal_length(
    tmp_path: Path, world: Any, mode: str, shorter: int, per_epoch: int
) -> None:
    """The shorter one is gone through again and again beside the longer one, in the middle of Lightning's epoch."""

    def run(checkpoint: Path | None = None) -> list[Any]:
        loaders = {"long": world(1, 0), "short": world(1, 0, Augmented(GLOBAL * shorter))}
        return fit(CombinedLoader(loaders, mode), tmp_path, checkpoint)

    straight = run()
    assert len(straight) == per_epoch * EPOCHS
    for step in range(1, len(straight)):
        assert run(tmp_path / f"step={step}.ckpt") == straight[step:], step
    for step in range(per_epoch, len(straight), per_epoch):
        assert run(tmp_path / f"end-step={step}.ckpt") == straight[step:], step


def test_lightning_leaves_the_sampler_in_place(world: Any) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    assert not trainer._data_connector._requires_distributed_sampler(world(2, 0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [train_loader, exact_loader])
def test_loading_leaves_the_global_generators_alone(make: Any, workers: int) -> None:
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert len(list(make(Augmented(), 4, num_workers=workers))) > 3
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state()) == before[2]


def drawn(*of: Any) -> dict[int, list[Any]]:
    """What was drawn, by sample."""
    return {index: rest for loader in of for batch in loader for index, *rest in rows(plain(batch))}


def test_what_is_drawn_for_a_sample_is_the_samples_own(world: Any) -> None:
    """Not the ranks', the workers' or the batch's; new in each epoch and with each seed, for each sample."""
    options = {"remainder": "uneven", "shuffle": False}
    one = drawn(world(1, 0, **options))
    assert len(one) == SAMPLES
    assert drawn(world(1, 0, num_workers=2, **options)) == one
    assert drawn(world(2, 0, **options), world(2, 1, num_workers=1, **options)) == one
    later, other = world(1, 0, **options), world(1, 0, **options, seed=4)
    later.sampler.set_epoch(1)
    for number in range(3):  # torch, random, numpy
        numbers = [str(each[i][number]) for each in (one, drawn(later), drawn(other)) for i in range(SAMPLES)]
        assert len(set(numbers)) == 3 * SAMPLES


def test_evaluation_draws_the_same_every_time() -> None:
    loader = exact_loader(Augmented(), 4)
    first = drawn(loader)
    torch.manual_seed(1)
    assert drawn(loader) == first == drawn(exact_loader(Augmented(), 7, num_workers=2))
    assert len({str(row) for row in first.values()}) == SAMPLES


def noisy(samples: list[Any]) -> Tensor:
    return torch.rand(3) + torch.tensor([random.random() + np.random.rand() for _ in range(3)])


@pytest.mark.parametrize("dataset", [Augmented(), TensorDataset(torch.arange(SAMPLES))])
def test_what_collate_draws_does_not_depend_on_workers_or_a_resumption(world: Any, dataset: Dataset[Any]) -> None:
    whole = [batch.tolist() for batch in world(1, 0, dataset, collate_fn=noisy)]
    assert len({str(batch) for batch in whole}) == 5
    second = world(1, 0, dataset, collate_fn=noisy, num_workers=2)
    second.load_state_dict({"epoch": 0, "batch": 2})
    assert [batch.tolist() for batch in second] == whole[2:]


def test_tensors_are_not_seeded_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded = []
    monkeypatch.setattr(batches.random, "seed", seeded.append)
    tensors = TensorDataset(torch.arange(8))
    for dataset in (tensors, Subset(tensors, range(8))):
        assert len(list(train_loader(dataset, 4))) == 2
    assert not seeded
    assert len(list(train_loader(Augmented(8), 4))) == 2
    assert len(seeded) == 8 + 2  # samples and batches


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Images of noise, the third of them cut off."""
    noise = np.random.default_rng(0).integers(256, size=(6, 16, 16), dtype=np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(6)]
    for path, image in zip(paths, noise, strict=True):
        Image.fromarray(image).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    return paths


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [train_loader, exact_loader])
def test_an_image_that_cannot_be_read_is_named_in_one_line(images: list[Path], make: Any, workers: int) -> None:
    line = (
        rf"sample 2 of Images \({re.escape(str(images[2]))}\): OSError: image file is truncated.*; repair or remove it"
    )
    for dataset in (Images(images), Subset(Images(images), [5, 2])):
        with pytest.raises(SampleError) as caught:
            list(make(dataset, 2, num_workers=workers))
        assert re.fullmatch(line, str(caught.value))
        assert "image file is truncated" in str(caught.value.__cause__)
        assert isinstance(caught.value.__cause__, OSError) or "in __getitem__" in str(caught.value.__cause__)
    images.pop(2)
    assert sum(len(batch) for batch in make(Images(images), 1, num_workers=workers)) == 5


class Broken(Dataset[Any]):
    paths = (Path("a.txt"), Path("b.txt"))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        raise ValueError("two\n  lines")


def test_lists_of_paths_and_several_lines_make_one_line_too() -> None:
    with pytest.raises(
        SampleError, match=r"^sample 0 of Broken \(a\.txt\): ValueError: two lines; repair or remove it$"
    ):
        next(iter(exact_loader(Broken(), 2)))


def test_the_names_are_where_they_were() -> None:
    assert data.ExactSampler is ExactSampler
    assert isinstance(train_loader(Augmented(), 4), DataLoader)
    assert isinstance(exact_loader(Augmented(), 4), DataLoader)
