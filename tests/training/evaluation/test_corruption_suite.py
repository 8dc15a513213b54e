"""The suite of corruptions against a test written out by hand, on one process and on two."""

import csv
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncbn.training.data.corruptions import corrupt
from syncbn.training.data.digits import Digits
from syncbn.training.errors import AgreedError, SettingError
from syncbn.training.evaluation.corruption_suite import CorruptionSuite
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET, quiet_trainer
from tests.training.support.settled_config import settled
from tests.training.support.train_command import train

CURVE = {"batch_sizes": [5, 50], "priors": [0, 16], "severities": [4], "images": 199}
KINDS, SEVERITIES = ["gaussian_noise", "shift"], [1, 4]


def scores(state: dict[str, Tensor], x: Tensor, prior: float | None) -> Tensor:
    """What an MLP of these weights says; with a prior, adapted to this batch (Schneider et al. 2020, section 3)."""
    x = x.flatten(1)
    layers = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
    for norm in layers:
        place, _, index = norm.rpartition(".")
        x = x @ state[f"{place}.{int(index) - 1}.weight"].T
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        if prior is not None:
            share = len(x) / (len(x) + prior)
            mean, var = (1 - share) * mean + share * x.mean(0), (1 - share) * var + share * x.var(0, correction=0)
        x = ((x - mean) / (var + 1e-5).sqrt() * state[f"{norm}.weight"] + state[f"{norm}.bias"]).relu()
    return x @ state["network.head.weight"].T + state["network.head.bias"]


def by_hand(state: dict[str, Tensor], images: Tensor, labels: Tensor, batch_size: int) -> dict[str, dict[str, float]]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]

    def accuracy(x: Tensor, cuts: list[int], prior: float | None) -> float:
        batches = [slice(*edges) for edges in pairwise(cuts)]
        right = [(scores(state, x[cut].double(), prior).argmax(1) == labels[cut]).double() for cut in batches]
        return torch.cat(right).mean().item()

    count = -(-len(images) // batch_size)
    equal = [i * len(images) // count for i in range(count + 1)]
    found: dict[str, dict[str, float]] = {"corrupted": {}, "adapted": {}, "clean": {}}
    for part, prior in (("corrupted", None), ("adapted", 2.0)):
        each = {
            (kind, severity): accuracy(corrupt(images, kind, severity), equal, prior)
            for kind in KINDS
            for severity in SEVERITIES
        }

        def mean(of: Callable[[str, int], bool], each: dict[tuple[str, int], float] = each) -> float:
            chosen = [value for key, value in each.items() if of(*key)]
            return sum(chosen) / len(chosen)

        found[part] = {f"{part}/acc": mean(lambda *_: True)}
        found[part] |= {f"{part}/acc_{kind}": mean(lambda k, s, kind=kind: k == kind) for kind in KINDS}
        found[part] |= {f"{part}/acc_severity{at}": mean(lambda k, s, at=at: s == at) for at in SEVERITIES}
    for size, prior in ((n, N) for n in CURVE["batch_sizes"] for N in CURVE["priors"]):
        cuts = list(range(0, 151, size))  # as many as are whole batches of the largest size
        found["clean"][f"clean/acc_n{size}_N{prior}"] = accuracy(images, cuts, prior)
        each_kind = [accuracy(corrupt(images, kind, 4), cuts, prior) for kind in KINDS]
        found["adapted"][f"adapted/acc_n{size}_N{prior}"] = sum(each_kind) / 2
    return found


QUICK = ["model=mlp", "logger=csv", "trainer.max_epochs=2", "+trainer.limit_train_batches=15", "optimizer.lr=0.02"]
QUICK += ["trainer.precision=64-true", "precise_batches=4", "corruptions=suite", "corruptions.batch_size=100"]
QUICK += ["corruptions.prior=2", f"corruptions.kinds={KINDS}".replace(" ", ""), "corruptions.severities=[1,4]"]
QUICK += ["corruptions.curve.batch_sizes=[5,50]", "corruptions.curve.severities=[4]", "corruptions.curve.images=199"]


def test_a_run_on_two_processes_measures_what_one_does_by_hand(tmp_path: Path) -> None:
    """With the weights of the checkpoint that was tested, and the measurement with other statistics apart."""
    run = train(tmp_path, *QUICK, "trainer.devices=2")
    assert run.code == 0, run.err
    result = run.json("result")
    state = torch.load(result["checkpoint"], weights_only=True)["state_dict"]
    data = Digits()
    data.setup("test")
    images, labels = data.test.tensors
    assert (scores(state, images.double(), None).argmax(1) == labels).double().mean().item() == pytest.approx(
        result["test"]["test/acc"], rel=1e-6
    )
    for part, expected in by_hand(state, images, labels, 100).items():
        assert result[part] == pytest.approx(expected, rel=1e-12), part
    assert 0.2 < result["corrupted"]["corrupted/acc"] < result["adapted"]["adapted/acc"] < 1
    assert "corrupted accuracy" in run.out
    assert result["precise"]["precise/count"] == 360
    assert run.directory is not None
    with (run.directory / "metrics.csv").open(encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    logged = [row for row in rows if "corrupted/acc" in row]
    assert [float(row["corrupted/acc"]) for row in logged] == [result["corrupted"]["corrupted/acc"]]


class Lit(pl.LightningModule):
    """A user's own."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), norm, nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Draws(TensorDataset):
    """As an augmentation does."""

    def __getitem__(self, index: int) -> Any:
        torch.rand(1)
        return super().__getitem__(index)


class Watch(pl.Callback):
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.state = torch.get_rng_state()


def a_loader(n: int = 30) -> DataLoader[Any]:
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(Draws(x, torch.arange(n) % 10), 7)


@QUIET
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False), nn.GroupNorm(2, 8)])
def test_it_is_a_callback_for_any_module_and_loader_and_leaves_them_as_they_were(
    tmp_path: Path, norm: nn.Module
) -> None:
    torch.manual_seed(0)
    module = Lit(norm)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    watches = Watch(), Watch()
    suite = CorruptionSuite(KINDS, SEVERITIES, curve=CURVE | {"batch_sizes": [5, 10]})
    quiet_trainer(watches[0], suite, watches[1], default_root_dir=tmp_path).test(module, a_loader(), verbose=False)
    adapts = getattr(norm, "running_mean", None) is not None
    assert suite.result.keys() == ({"corrupted", "adapted", "clean"} if adapts else {"corrupted"})
    images, labels = a_loader().dataset.tensors  # type: ignore[attr-defined]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    module.eval()
    with torch.no_grad():
        right = [(module(corrupt(images, "shift", s)).argmax(1) == labels).double().mean() for s in SEVERITIES]
    assert suite.result["corrupted"]["corrupted/acc_shift"] == pytest.approx(sum(right).item() / 2)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(watches[0].state, watches[1].state)
    assert not norm._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"kinds": ["fog"]}, ("kinds", "fog", "use one of gaussian_noise, ")),
        ({"kinds": []}, ("kinds", [], "use one or more, each once")),
        ({"severities": [1, 1]}, ("severities", [1, 1], "use one or more, each once")),
        ({"severities": [9]}, ("severities", 9, "use a whole number from 1 to 5")),
        ({"batch_size": 0}, ("batch_size", 0, "use whole numbers, 1 or more")),
        ({"prior": -1}, ("prior", -1, "use a number of samples, 0 ")),
        (
            {"curve": {"priors": [0]}},
            ("curve", {"priors": [0]}, "use null, or all of batch_sizes, priors, severities, images"),
        ),
        (
            {"curve": CURVE | {"batch_sizes": [4, 50]}},
            ("curve.batch_sizes", [4, 50], "use divisors of the largest, 50, so that all sizes use the same"),
        ),
        ({"curve": CURVE | {"images": 49}}, ("curve.images", 49, "use at least the largest batch, 50")),
        ({"curve": CURVE | {"priors": []}}, ("curve.priors", [], "use one or more")),
        ({"curve": CURVE | {"priors": [0.5]}}, ("curve.priors", 0.5, "use whole numbers, 0 or more")),
        ({"curve": CURVE | {"severities": [6]}}, ("curve.severities", 6, "use a whole number from 1 to 5")),
    ],
)
def test_what_is_no_suite_is_refused(options: dict[str, Any], refusal: tuple[str, Any, str]) -> None:
    setting, value, words = refusal
    with refuses(f"corruptions.{setting}", value, words):
        CorruptionSuite(**({"kinds": KINDS, "severities": SEVERITIES} | options))


SUITE = ("corruptions", None)


@pytest.mark.parametrize(
    ("module", "data", "refusal"),
    [
        (
            pl.LightningModule(),
            Digits(),
            partial(refuses, *SUITE, "LightningModule has no forward(); give it one", kind=AgreedError),
        ),
        (
            Lit(nn.Identity()),
            Digits(shards="brightness", num_shards=2),
            partial(refuses, *SUITE, "range from 0 to 1.8;", "in [0, 1]"),
        ),
        (
            Lit(nn.Identity()),
            [a_loader()],
            partial(refuses, *SUITE, "are a list; use one DataLoader over a", kind=AgreedError),
        ),
        (
            Lit(nn.Identity()),
            a_loader(20),
            partial(
                refuses, "corruptions.curve.batch_sizes", [5, 50], "has 20 images; use at most 20, or", kind=AgreedError
            ),
        ),
        (Lit(nn.Identity()), Digits(), nullcontext),
    ],
)
def test_what_cannot_be_tested_is_refused_before_training(module: Any, data: Any, refusal: Any) -> None:
    if not isinstance(data, Digits):
        data = SimpleNamespace(setup=lambda stage: None, test_dataloader=lambda loader=data: loader)
    suite = CorruptionSuite(KINDS, SEVERITIES, curve=CURVE)
    trainer: Any = SimpleNamespace(datamodule=data)
    with refusal():
        suite.setup(trainer, module, "fit")


def test_without_a_test_there_is_nothing_to_repeat() -> None:
    settled("corruptions=suite")
    with refuses("corruptions", None, "test=false leaves no test to repeat; use test=true, or corruptions=null"):
        settled("corruptions=suite", "test=false")
    with pytest.raises(
        SettingError, match=r"corruptions: data\.corruption=shift corrupts .* already; use .*=null, or corrup"
    ):
        settled("corruptions=suite", "data.corruption=shift")
