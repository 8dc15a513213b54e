"""``data.balance=true``: equally many of each class, the same global batches on any number of ranks, and a position."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from syncbn.training.data import loaders
from syncbn.training.data.loaders import train_loader
from syncbn.training.data.samplers import GlobalBatchSampler
from tests.support.refuses import refuses

LABELS = [0] * 20 + [1] * 5 + [2] * 2


class Drawn(Dataset[Any]):
    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.rand(1)


def sampler(size: int = 6, ranks: int = 1, rank: int = 0, **options: Any) -> GlobalBatchSampler:
    return GlobalBatchSampler(Drawn(), size, ranks, rank, balance=LABELS, seed=1, **options)


@pytest.mark.parametrize(("remainder", "samples"), [("drop", 24), ("pad", 30), ("uneven", 27)])
def test_every_global_batch_has_equally_many_of_each_class(remainder: str, samples: int) -> None:
    for epoch in range(3):
        one = sampler(remainder=remainder)
        one.set_epoch(epoch)
        batches = [[LABELS[i] for i in request.indices] for request in one]
        assert sum(map(len, batches)) == samples
        for batch in batches:
            assert set(Counter(batch).values()) == {len(batch) // 3}


def drawn(epochs: range, **options: Any) -> list[int]:
    found = []
    for epoch in epochs:
        one = sampler(**options)
        one.set_epoch(epoch)
        found += [i for request in one for i in request.indices]
    return found


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("remainder", "size"), [("drop", 6), ("pad", 4), ("uneven", 4), ("drop", 13)])
def test_no_sample_is_drawn_again_before_all_others_of_its_class(shuffle: bool, remainder: str, size: int) -> None:
    """Also if the number of classes does not divide an epoch (size 4 and 13)."""
    indices = drawn(range(30), shuffle=shuffle, remainder=remainder, size=size)
    for label in range(3):
        of_class = [i for i in indices if LABELS[i] == label]
        members = LABELS.count(label)
        assert len(of_class) > 2 * members
        passes = [of_class[i : i + members] for i in range(0, len(of_class), members)]
        assert all(len(set(one)) == len(one) for one in passes)
        assert (passes[0] == sorted(passes[0])) is not shuffle or members == 2
    assert max(Counter(LABELS[i] for i in indices).values()) - len(indices) / 3 < 1  # the last rows take turns


def test_small_classes_are_repeated_and_each_epoch_has_another_order() -> None:
    first, second = drawn(range(1)), drawn(range(1, 2))
    assert first != second
    assert set(Counter(i for i in first if LABELS[i] == 2).values()) == {4}
    assert drawn(range(1)) == first


@pytest.mark.parametrize("remainder", ["drop", "pad", "uneven"])
def test_global_batches_do_not_depend_on_the_ranks(remainder: str) -> None:
    whole = list(sampler(remainder=remainder))
    for ranks in (2, 3):
        shares = [list(sampler(6 // ranks, ranks, rank, remainder=remainder)) for rank in range(ranks)]
        for batch, *parts in zip(whole, *shares, strict=True):
            for rank, part in enumerate(parts):
                assert part.indices == batch.indices[rank::ranks]
                assert part.repeats == batch.repeats[rank::ranks]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_repeated_sample_draws_anew_and_a_resume_draws_the_same(workers: int) -> None:
    def loader() -> Any:
        return train_loader(Drawn(), 6, balance=LABELS, seed=2, num_workers=workers)

    straight = [(x.tolist(), y.flatten().tolist()) for x, y in loader()]
    drawn: dict[int, list[float]] = {}
    for indices, values in straight:
        for index, value in zip(indices, values, strict=True):
            drawn.setdefault(index, []).append(value)
    repeated = [values for values in drawn.values() if len(values) > 1]
    assert repeated
    assert all(len(set(values)) == len(values) for values in repeated)
    again = loader()
    again.load_state_dict({"epoch": 0, "batch": 2})
    assert [(x.tolist(), y.flatten().tolist()) for x, y in again] == straight[2:]


def test_shards_and_balance_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "world_size", lambda: 1)
    with refuses("data.balance", True, "shards have an order of their own"):
        sampler(shards=[[0, 1], [2, 3]])
