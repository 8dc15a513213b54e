"""Domain shards: which device gets which images, and what is counted of them in evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from syncbn.training.data.digits import Digits
from syncbn.training.data.loaders import train_loader
from syncbn.training.data.samplers import GlobalBatchSampler
from syncbn.training.data.shards import collate, evaluation_shards, to_domain, train_shards
from syncbn.training.models.classifier import Classifier
from tests.support.ranks import Ranks
from tests.support.refuses import refuses
from tests.training.support.train_command import train


@given(
    sizes=st.lists(st.integers(4, 30), min_size=2, max_size=4),
    ranks=st.sampled_from([1, 2]),
    per_shard=st.integers(1, 4),
    remainder=st.sampled_from(["drop", "pad"]),
    epoch=st.integers(0, 2),
)
def test_each_position_is_of_its_shard_and_no_sample_comes_twice(
    sizes: list[int], ranks: int, per_shard: int, remainder: str, epoch: int
) -> None:
    numbers = iter(range(sum(sizes)))
    shards = [[next(numbers) for _ in range(size)] for size in sizes]
    count, dataset = len(sizes), TensorDataset(torch.arange(sum(sizes)))
    size = ranks * count * per_shard
    options = {"seed": 5, "remainder": remainder, "shards": shards}
    if remainder == "drop" and count * min(sizes) < size:
        with refuses("data.batch_size", count * per_shard, f"the training set has {count * min(sizes)}; use at most"):
            GlobalBatchSampler(dataset, count * per_shard, ranks, 0, **options)
        return
    dealers = [GlobalBatchSampler(dataset, count * per_shard, ranks, rank, **options) for rank in range(ranks)]
    for dealer in dealers:
        dealer.set_epoch(epoch)
    dealt = [[request.indices for request in dealer] for dealer in dealers]
    batches = [[i for each in zip(*shares, strict=True) for i in each] for shares in zip(*dealt, strict=True)]
    assert all(len(batch) == size for batch in batches)
    for batch in batches:
        assert all(index in shards[position % count] for position, index in enumerate(batch))
    order = [index for batch in batches for index in batch]
    for place, shard in enumerate(shards):
        of_it = order[place::count]
        first = of_it[: len(shard)]
        assert len(set(first)) == len(first)  # all of it before any comes again
        assert of_it[len(shard) :] == (first * len(of_it))[: len(of_it) - len(first)]
    least, most = count * min(sizes), count * max(sizes)
    assert len(order) == (least // size if remainder == "drop" else -(-most // size)) * size


def test_epochs_have_orders_of_their_own_and_without_shuffle_none() -> None:
    dataset, shards = TensorDataset(torch.arange(40)), [list(range(20)), list(range(20, 40))]

    def order(epoch: int, shuffle: bool) -> list[int]:
        sampler = GlobalBatchSampler(dataset, 40, 1, 0, shards=shards, shuffle=shuffle)
        sampler.set_epoch(epoch)
        return next(iter(sampler)).indices

    assert order(0, True) == order(0, True) != order(1, True)
    assert order(0, False) == order(1, False) == [i for pair in zip(*shards, strict=True) for i in pair]


def test_one_process_has_the_samples_of_two_ranks_at_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    def epoch(rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
        monkeypatch.setattr("syncbn.training.data.loaders.world_size", lambda: ranks)
        monkeypatch.setattr("syncbn.training.data.loaders.this_rank", lambda: rank)
        data = Digits(16 // ranks, shards="inversion", num_shards=2)
        data.setup("fit")
        return list(data.train_dataloader())

    one = epoch(0, 1)
    for rank in range(2):
        for whole, share in zip(one, epoch(rank, 2), strict=True):
            assert all(torch.equal(of_all[rank::2], of_it) for of_all, of_it in zip(whole, share, strict=True))


@pytest.mark.parametrize("kind", ["labels", "brightness", "inversion"])
def test_what_the_shards_hold(kind: str) -> None:
    plain, sharded = Digits(), Digits(shards=kind, num_shards=3)
    for data in (plain, sharded):
        data.setup("fit")
    assert sorted(i for part in sharded.parts for i in part) == list(range(len(plain.train)))
    for shard, part in enumerate(sharded.parts):
        images, labels = sharded.train[part]
        before, _ = plain.train[part]
        if kind == "labels":
            assert labels.unique().tolist() == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]][shard]
            assert torch.equal(images, before)
        elif kind == "brightness":
            torch.testing.assert_close(images - before, torch.full_like(images, 0.4 * shard))
        else:
            assert torch.equal(images, 1 - before if shard == 1 else before)
    x, y, of = sharded.test.tensors
    images, labels = plain.test.tensors
    if kind == "labels":
        assert torch.equal(x, images)
        assert [y[of == shard].unique().tolist() for shard in range(3)] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    else:
        for shard in range(3):  # every image in every domain
            assert torch.equal(x[of == shard], to_domain(kind, shard, 3, images))
            assert torch.equal(y[of == shard], labels)


def test_a_batch_unpacks_into_images_and_labels_for_modules_that_know_of_no_shards() -> None:
    data = evaluation_shards("brightness", 2, TensorDataset(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 2])))
    batch = collate([data[i] for i in (0, 4)])
    x, y = batch
    assert x is batch.images is batch[0]
    assert y.tolist() == batch[1].tolist() == [0, 1]
    assert batch.shards.tolist() == [0, 1]
    assert len(batch) == 2


@pytest.mark.parametrize(
    ("make", "refusal"),
    [
        (
            lambda: Digits(shards="hue", num_shards=2),
            ("data.shards", "hue", "use labels, brightness or inversion, or null"),
        ),
        (
            lambda: Digits(shards="labels", num_shards=1),
            ("data.shards=labels with data.num_shards", 1, "two or more devices (trainer.devices=2"),
        ),
        (lambda: Digits(num_shards=2), ("data.num_shards", 2, "use data.shards=labels, brightness or inversion")),
        (
            lambda: train_shards("labels", 4, some(3)),
            ("data.shards", "labels", "3 classes cannot fill 4 shards; use at most 3 devices"),
        ),
        (
            lambda: train_loader(some(9), 3, shards=[[0], [1]]),
            ("data.num_shards", 2, "a global batch of 3 samples ", " a multiple of 2"),
        ),
        (
            lambda: train_loader(some(9), 2, shards=[[0], [1]], remainder="uneven"),
            ("data.remainder", "uneven", "use data.remainder=drop or pad"),
        ),
        (
            lambda: train_loader(some(9), 2, shards=[[0], []]),
            ("data.num_shards", 2, "a shard has no training image; use fewer"),
        ),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], object], refusal: tuple[Any, ...]) -> None:
    with refuses(*refusal):
        make()


def some(n: int) -> TensorDataset:
    return TensorDataset(torch.rand(n, 1), torch.arange(n))


def evaluate(rank: int, world_size: int, kind: str) -> dict[str, float]:
    """What a network that answers by the pixels themselves gets, through all of the evaluation but Lightning's loop."""
    data = Digits(16, shards=kind, num_shards=3)
    data.setup("test")
    module = Classifier(a_network(), torch.optim.SGD, num_classes=10)
    module._trainer = type("", (), {"datamodule": data})()
    module.setup("test")
    logged = {}
    module.log = lambda name, metric, **_: logged.update({name: metric})  # type: ignore[method-assign]
    for index, batch in enumerate(data.test_dataloader()):
        module.test_step(batch, index)
    return {name: metric.compute().item() for name, metric in logged.items()}


def a_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize("kind", ["labels", "inversion"])
def test_each_shard_has_an_accuracy_that_is_exact_on_any_number_of_ranks(ranks: Ranks, kind: str) -> None:
    data = Digits(shards=kind, num_shards=3)
    data.setup("test")
    x, y, of = data.test.tensors
    right = (a_network()(x).argmax(1) == y).double()
    expected = {f"test/acc_shard{shard}": right[of == shard].mean().item() for shard in range(3)}
    expected |= {"test/acc": right.mean().item(), "test/count": 360 * (1 if kind == "labels" else 3)}
    assert len(set(expected.values())) == (5 if kind == "labels" else 4)  # two shards of three are not inverted
    if kind == "inversion":
        assert right.mean().item() == pytest.approx(sum(expected[f"test/acc_shard{shard}"] for shard in range(3)) / 3)
    for world_size in (1, 2):
        for logged in ranks.run(evaluate, kind, world_size=world_size):
            assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-6)


MLP = ["model=mlp", "logger=csv", "data.shards=brightness", "trainer.max_epochs=1"]


def test_a_run_tests_every_image_in_every_domain(tmp_path: Path) -> None:
    run = train(tmp_path, *MLP, "trainer.devices=2", "trainer.precision=64-true")
    assert run.code == 0, run.err
    test = run.json("result")["test"]
    assert test["test/count"] == 720
    assert test["test/acc"] == pytest.approx((test["test/acc_shard0"] + test["test/acc_shard1"]) / 2)


def test_a_single_device_has_no_shards(tmp_path: Path) -> None:
    run = train(tmp_path, *MLP, "trainer.devices=1")
    assert run.code == 1
    assert run.err.startswith(
        "error: data.shards=brightness with data.num_shards=1: shards differ from each other; use"
    )
    assert len(run.err.splitlines()) == 1
