"""Batches that ranks cannot share equally: each sample counts once, and the step is that of one process."""

import csv
import re
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import syncbn
from syncbn.training.data.digits import Digits
from syncbn.training.data.loaders import train_loader
from syncbn.training.data.samplers import GlobalBatchSampler
from syncbn.training.models.classifier import Classifier
from syncbn.training.norm.uneven_batches import _has_single_sample
from tests.support.ranks import Ranks
from tests.support.refuses import refuses
from tests.training.support.train_command import Run, train

EPOCHS, PER_RANK, SEED = 3, 4, 5


@given(
    ranks=st.integers(1, 5),
    samples=st.integers(1, 120),
    per_rank=st.integers(1, 9),
    remainder=st.sampled_from(["drop", "pad", "uneven"]),
    epoch=st.integers(0, 3),
)
def test_global_batches_are_the_order_cut_up_and_dealt(
    ranks: int, samples: int, per_rank: int, remainder: str, epoch: int
) -> None:
    dataset, size = TensorDataset(torch.arange(samples)), per_rank * ranks
    if remainder == "drop" and samples < size:
        with refuses("data.batch_size", per_rank, f"has {samples}; use at most {samples // ranks}"):
            GlobalBatchSampler(dataset, per_rank, ranks, 0)
        return
    dealers = [GlobalBatchSampler(dataset, per_rank, ranks, r, seed=SEED, remainder=remainder) for r in range(ranks)]
    for dealer in dealers:
        dealer.set_epoch(epoch)
    dealt = [[request.indices for request in dealer] for dealer in dealers]
    batches = [[i for share in shares for i in share] for shares in zip(*dealt, strict=True)]
    order = an_order(dataset, epoch)
    end = {"drop": samples // size * size, "pad": -(-samples // size) * size, "uneven": samples}[remainder]
    expected = (order * (end // samples + 1))[:end]
    assert [sorted(batch) for batch in batches] == [sorted(expected[i : i + size]) for i in range(0, end, size)]
    for number, shares in enumerate(zip(*dealt, strict=True)):
        sizes = [len(share) for share in shares]
        assert sizes == dealers[0].shares(number)
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= per_rank
    if remainder == "uneven":
        assert sorted(i for batch in batches for i in batch) == list(range(samples))
    assert len(dealers[0]) == len(batches)


@given(ranks=st.integers(1, 4), samples=st.integers(8, 60), epoch=st.integers(0, 2))
def test_dropping_gives_each_rank_what_torchs_sampler_gives(ranks: int, samples: int, epoch: int) -> None:
    dataset, size = TensorDataset(torch.arange(samples)), 2
    for rank in range(ranks):
        theirs = DistributedSampler(dataset, ranks, rank, seed=SEED, drop_last=True)
        ours = GlobalBatchSampler(dataset, size, ranks, rank, seed=SEED)
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        expected = [batch.tolist() for (batch,) in DataLoader(dataset, size, sampler=theirs, drop_last=True)]
        assert [request.indices for request in ours] == expected


def test_torchs_synchronized_layer_is_alone_with_one_sample_over_all_ranks() -> None:
    layer = nn.SyncBatchNorm(2)
    assert [_has_single_sample(layer, shares, 0) for shares in ([1, 1], [1, 0], [0, 1])] == [False, True, True]


def test_a_wrong_word_is_refused() -> None:
    for make in (Digits, partial(train_loader, TensorDataset(torch.arange(9)), 2)):
        with refuses("data.remainder", "keep", "use one of drop, pad, uneven"):
            make(remainder="keep")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_empty_batch_has_shapes(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("syncbn.training.data.loaders.world_size", lambda: 2)
    monkeypatch.setattr("syncbn.training.data.loaders.this_rank", lambda: 1)
    samples = [{"x": torch.ones(3, 2), "y": (1, 0.5)}] * 5
    *full, last = train_loader(samples, 2, remainder="uneven", num_workers=workers)  # type: ignore[arg-type]
    assert [batch["x"].shape for batch in full] == [(2, 3, 2)]
    assert last["x"].shape == (0, 3, 2)
    assert last["y"][0].shape == last["y"][1].shape == (0,)
    assert last["y"][0].dtype == torch.int64


def a_net(dense: bool) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 6),
        *([nn.BatchNorm1d(6, momentum=None)] if dense else []),
        nn.ReLU(),
        nn.Linear(6, 3),
    ).double()


def a_dataset(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 2, 4, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x + torch.arange(samples).view(-1, 1, 1, 1), torch.arange(samples) % 3, torch.arange(samples))


def an_order(dataset: Any, epoch: int) -> list[int]:
    sampler = DistributedSampler(dataset, 1, 0, seed=SEED)
    sampler.set_epoch(epoch)
    return list(sampler)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def in_one_process(net: nn.Module, dataset: TensorDataset, batch_size: int, smoothing: float) -> tuple[Any, list[Any]]:
    """Torch's own means, all the way."""
    optimizer, logged = sgd(net.parameters()), []
    for epoch in range(EPOCHS):
        losses, right = [], []
        for x, target, _ in DataLoader(Subset(dataset, an_order(dataset, epoch)), batch_size):
            optimizer.zero_grad()
            scores = net(x)
            loss = F.cross_entropy(scores, target, label_smoothing=smoothing)
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(x)
            right += (scores.argmax(1) == target).tolist()
        logged.append((sum(losses) / len(dataset), sum(right) / len(dataset)))
    return net.state_dict(), logged


class Step(nn.Module):
    """What Lightning makes of a LightningModule for DistributedDataParallel."""

    def __init__(self, module: Classifier) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        return self.module.training_step(batch, 0)


def on_a_rank(
    rank: int, world_size: int, net: nn.Module, dataset: TensorDataset, smoothing: float
) -> tuple[Any, list[Any], list[list[list[int]]]]:
    loader = train_loader(dataset, PER_RANK, seed=SEED, remainder="uneven")
    module = Classifier(net, sgd, num_classes=3, label_smoothing=smoothing).double()
    module._trainer = SimpleNamespace(train_dataloader=loader, world_size=world_size)  # type: ignore[assignment]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    wrapped, optimizer = DistributedDataParallel(Step(module)), sgd(net.parameters())
    logged, got = [], []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        got.append([])
        for x, target, indices in loader:
            optimizer.zero_grad()
            loss = wrapped((x, target))
            assert loss.isfinite()  # also of no samples
            loss.backward()
            optimizer.step()
            got[-1].append(indices.tolist())
        logged.append((module.train_mean_loss.compute().item(), module.train_acc.compute().item()))
        module.train_mean_loss.reset()
        module.train_acc.reset()
    return net.state_dict(), logged, got


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")  # on a rank that never has a sample
@pytest.mark.parametrize(
    ("world_size", "samples", "smoothing"),
    [
        (2, 3 * 8 + 1, 0.0),  # one sample over two ranks: one of them has none
        (2, 3 * 8 + 5, 0.1),
        (2, 3 * 8 + 6, 0.0),
        (3, 2 * 12 + 2, 0.1),
        (3, 2 * 12 + 7, 0.0),
        (3, 2, 0.0),  # no full batch at all, and never a sample on the last rank
    ],
)
def test_uneven_ranks_follow_one_process(ranks: Ranks, world_size: int, samples: int, smoothing: float) -> None:
    dataset, size = a_dataset(samples), world_size * PER_RANK
    net = a_net(dense=samples % size != 1)
    state, logged = in_one_process(deepcopy(net), dataset, size, smoothing)
    results = ranks.run(on_a_rank, syncbn.convert(net), dataset, smoothing, world_size=world_size)
    for theirs, numbers, _ in results:
        assert theirs.keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-10)
        for ours, expected in zip(numbers, logged, strict=True):
            assert ours == pytest.approx(expected, rel=1e-6)  # metrics are float32
    for epoch in range(EPOCHS):
        shares = [got[epoch] for _, _, got in results]
        assert len({len(share) for share in shares}) == 1
        assert sorted(i for share in shares for batch in share for i in batch) == list(range(samples))
        assert any(not share[-1] for share in shares) == (samples % size < world_size)


MEASURES = ("train/loss", "train/acc", "val/loss", "val/acc")


def trained(where: Path, name: str, *settings: str) -> Run:
    probe = f"+callbacks.probe={{_target_: mine.Probe, path: {where / name}}}"
    common = ("data.remainder=uneven", "trainer.max_epochs=2", "trainer.precision=64-true", "logger=csv", "test=false")
    run = train(where, *common, probe, *settings, timeout=170)
    assert run.code == 0, run.err
    return run


def measures(run: Run) -> list[float]:
    assert run.directory is not None
    with (run.directory / "metrics.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return [float(row[name]) for name in MEASURES for row in table if row.get(name)]


# 1,167 images: 11 batches of 106 and one image, so that the second device sees none; 36 batches of 32 and 15 images.
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("model", "size", "steps"), [("resnet model.width=4", 106, 24), ("mlp", 32, 74)])
def test_two_devices_follow_one_to_the_last_sample(tmp_path: Path, model: str, size: int, steps: int) -> None:
    data = (f"data.global_batch_size={size}", *f"model={model}".split())
    one = trained(tmp_path, "one", *data, "trainer.devices=1", "norm=local")
    two = trained(tmp_path, "two", *data, "trainer.devices=2", "norm=sync")
    assert one.json("result")["steps"] == two.json("result")["steps"] == steps
    expected = torch.load(tmp_path / "one.0.pt")
    for rank in range(2):
        for key, value in torch.load(tmp_path / f"two.{rank}.pt").items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9)
    assert len(measures(one)) == 8
    assert measures(two) == pytest.approx(measures(one), rel=1e-5)


LONE = (
    r"data\.remainder=uneven: the last batch of an epoch has {}, and with {} a {} has one value per channel to "
    r"normalize; use data\.batch_size={}, data\.remainder=drop or data\.remainder=pad"
)
# 1,169 images: 53 batches of 22, of the last three images the second device has one.
ON_A_RANK = ("3 of 1169 samples", "one sample on a rank", "SyncBatchNorm1d", 10)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("norm=local data.global_batch_size=106", ("1 of 1167 samples", "one sample", "BatchNorm1d", 52)),
        ("norm=sync data.global_batch_size=106", ("1 of 1167 samples", "one sample", "SyncBatchNorm1d", 52)),
        ("norm.group=1 data.global_batch_size=22 data.val_fraction=0.149", ON_A_RANK),
    ],
)
def test_one_value_per_channel_is_refused_in_the_first_batch(tmp_path: Path, settings: str, words: Any) -> None:
    run = train(tmp_path, "model=mlp", "data.remainder=uneven", "logger=csv", *settings.split())
    assert run.code == 1
    assert re.fullmatch(f"error: {LONE.format(*words)}\n", run.err), run.err
    assert run.directory is not None
    assert not (run.directory / "checkpoints").exists()  # it did not take an epoch


@pytest.mark.parametrize(
    "settings",
    ["norm=none model=mlp", "norm=group_norm model=mlp", "norm=local model=resnet", "norm=sync model=resnet"],
)
def test_an_empty_rank_is_no_trouble(tmp_path: Path, settings: str) -> None:
    """With per-device statistics neither: torch's layer leaves its running statistics alone."""
    run = trained(tmp_path, "seen", "data.global_batch_size=106", "trainer.max_epochs=1", *settings.split())
    assert all(value == value for value in measures(run))
    for rank in range(2):
        state = torch.load(tmp_path / f"seen.{rank}.pt")
        assert all(value.isfinite().all() for value in state.values())


def test_a_last_batch_that_is_never_reached_is_not_refused(tmp_path: Path) -> None:
    limited = ("data.global_batch_size=106", "model=mlp", "+trainer.limit_train_batches=11", "trainer.max_epochs=1")
    assert trained(tmp_path, "seen", *limited, "norm=local").json("result")["steps"] == 11
