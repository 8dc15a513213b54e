import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from syncbn.training.data.digits import Digits
from syncbn.training.data.loaders import train_loader
from syncbn.training.data.samplers import ExactSampler
from tests.support.refuses import refuses


@given(ranks=st.integers(1, 9), extra=st.integers(0, 300), batch_size=st.integers(1, 40), seed=st.none() | st.just(0))
def test_every_sample_is_dealt_once_in_equally_many_batches(
    ranks: int, extra: int, batch_size: int, seed: int | None
) -> None:
    dataset = TensorDataset(torch.arange(ranks + extra))
    samplers = [ExactSampler(dataset, batch_size, ranks, rank) for rank in range(ranks)]
    for sampler in samplers:
        sampler.shuffle_seed = seed
    shares = [list(sampler) for sampler in samplers]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(dataset)))
    assert len({len(share) for share in shares}) == 1
    sizes = {len(batch) for share in shares for batch in share}
    assert min(sizes) >= 1
    assert max(sizes) <= (batch_size if batch_size > 1 else 2)
    assert len(shares[0]) == len(ExactSampler(dataset, batch_size, ranks, 0))


def test_fewer_samples_than_ranks_are_refused() -> None:
    with refuses("trainer.devices", None, "fewer samples (1) than there are ranks (2); use at most 1"):
        ExactSampler(TensorDataset(torch.arange(1)), 4, 2, 0)


def test_digits_are_split_by_class_and_by_seed() -> None:
    data, other = Digits(split_seed=0), Digits(split_seed=1)
    for module in (data, other):
        module.setup("fit")
    sizes = [len(part) for part in (data.train, data.val, data.test)]
    assert sizes == [1167, 270, 360]
    for part in (data.train, data.val, data.test):
        share = torch.bincount(part.tensors[1], minlength=10) / len(part)
        assert share.min() > 0.085
        assert share.max() < 0.115
    images = torch.cat([part.tensors[0].flatten(1) for part in (data.train, data.val, data.test)])
    assert len(images.unique(dim=0)) == 1797
    assert 0 <= images.min() < images.max() <= 1
    assert not torch.equal(data.test.tensors[0], other.test.tensors[0])


def test_a_global_batch_holds_the_same_samples_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TensorDataset(torch.arange(50))

    def global_batches(ranks: int) -> list[list[int]]:
        shares = []
        for rank in range(ranks):
            monkeypatch.setattr("syncbn.training.data.loaders.world_size", lambda: ranks)
            monkeypatch.setattr("syncbn.training.data.loaders.this_rank", lambda rank=rank: rank)
            loader = train_loader(dataset, 12 // ranks, seed=3)
            loader.sampler.set_epoch(1)
            shares.append([batch[0].tolist() for batch in loader])
        return [sorted(i for part in parts for i in part) for parts in zip(*shares, strict=True)]

    one = global_batches(1)
    assert [len(batch) for batch in one] == [12] * 4
    assert global_batches(2) == one
    assert global_batches(3) == one
