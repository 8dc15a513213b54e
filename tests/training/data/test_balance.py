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


def test_large_classes_take_turns_and_small_ones_are_repeated() -> None:
    seen: Counter[int] = Counter()
    for epoch in range(30):
        one = sampler(remainder="drop")
        one.set_epoch(epoch)
        indices = [i for request in one for i in request.indices]
        assert max(Counter(i for i in indices if LABELS[i] == 0).values()) == 1
        assert set(Counter(i for i in indices if LABELS[i] == 2).values()) == {4}
        seen.update(indices)
    assert len(seen) == len(LABELS)
    assert indices != [i for request in sampler() for i in request.indices]


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
