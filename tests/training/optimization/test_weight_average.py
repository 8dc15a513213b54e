"""The average of the weights against its definition, in float64, from the raw weights of every step and rank."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from syncbn.training import EMA, SWA, Digits
from syncbn.training.data.loaders import train_loader
from syncbn.training.optimization.weight_average import WeightAverage, build
from tests.training.support.plain_lightning import QUIET, quiet_trainer
from tests.training.support.train_command import train

QUICK = ["model=mlp", "logger=csv", "trainer.max_epochs=3", "trainer.precision=64-true", "optimizer.lr=0.02"]
QUICK += ["++trainer.limit_train_batches=4", "scheduler=constant", "run.id=a", "test=false", "model.depth=2"]
RECORDS = ["+callbacks.records._target_=averages.Records", "+callbacks.records.path=seen"]
TWO = ["trainer.devices=2"]
Weights = dict[str, Tensor]


def recorded(where: Path, *settings: str) -> tuple[list[dict[str, list[Weights]]], dict[str, Any]]:
    """What each rank has recorded, and the last checkpoint."""
    run = train(where, *QUICK, *RECORDS, *settings).ended()
    ranks = [torch.load(path, weights_only=True) for path in sorted(where.glob("seen-*"))]
    return ranks, torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[operator]


def of_all(states: list[Weights], norm: str) -> Weights:
    """The state of the training, from those of the ranks: pooled statistics for local_mean, else those of rank 0."""
    found = {name: value for name, value in states[0].items() if not name.endswith("rows")}
    for name in found:
        layer, _, kind = name.rpartition(".")
        if norm != "local_mean" or kind not in ("running_mean", "running_var"):
            continue
        means = torch.stack([state[f"{layer}.running_mean"] for state in states])
        variances = torch.stack([state[f"{layer}.running_var"] for state in states])
        if f"{layer}.rows" in states[0]:
            means, variances = states[0][f"{layer}.rows"]
        pooled = {"running_mean": means.mean(0), "running_var": variances.mean(0) + means.var(0, correction=0)}
        found[name] = pooled[kind]
    return found


def follows(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "settings",
    [
        [*TWO, "norm=sync"],
        [*TWO, "norm=local"],
        [*TWO, "norm=local_mean"],
        [*TWO, "norm=group_norm", "trainer.accumulate_grad_batches=2"],
        ["simulate=2", "norm=local_mean", "averaging.every_n_steps=3", "averaging.warmup=true"],
    ],
    ids=" ".join,
)
def test_ema_is_its_definition_for_each_norm(tmp_path: Path, settings: list[str]) -> None:
    ranks, last = recorded(tmp_path, "averaging.ema=0.7", *settings)
    norm = next(each.removeprefix("norm=") for each in settings if each.startswith("norm="))
    every = 3 if "averaging.every_n_steps=3" in settings else 1
    average, updates, validated = {}, 0, []
    for number in range(len(ranks[0]["steps"])):
        accumulates = "accumulate_grad_batches=2" in " ".join(settings) and number % 2 == 0
        if (number + 1) % every == 0 and not accumulates:
            now = of_all([rank["steps"][number] for rank in ranks], norm)
            decay = min(0.7, 1 - (1 + updates) ** (-2 / 3)) if "averaging.warmup=true" in settings else 0.7
            average = {
                name: value
                if not updates or not value.is_floating_point()
                else decay * average[name] + (1 - decay) * value
                for name, value in now.items()
            }
            updates += 1
        if number % 4 == 3:
            counters = {n: v for n, v in ranks[0]["steps"][number].items() if not v.is_floating_point()}
            validated.append(average | counters)
    assert len(validated) == 3
    for rank in ranks:
        for actual, expected in zip(rank["validated"], validated, strict=True):
            follows(actual, expected)
        for name, value in ranks[0]["validated"][-1].items():
            assert torch.equal(value, rank["validated"][-1][name]), name  # the ranks' are the same, bitwise
    follows(last["state_dict"], validated[-1])
    after, before = ranks[0]["after"][-1], ranks[0]["steps"][-1]
    for name, value in last["current_model_state"].items():  # training continues with the raw weights
        if "running" in name:  # pooled again at the end of the epoch, to rounding
            torch.testing.assert_close(value, after[name], rtol=1e-14, atol=1e-15)
        else:
            assert torch.equal(value, after[name]), name
            assert torch.equal(value, before[name]), name


def test_swa_is_the_mean_of_the_last_epochs_with_statistics_of_its_own(tmp_path: Path) -> None:
    """The statistics are those that one process finds over the same images with the averaged weights."""
    ranks, last = recorded(
        tmp_path, *TWO, "averaging.swa_from=2", "averaging.swa_lr=0.01", "trainer.max_epochs=4", "norm=sync"
    )
    ends = [ranks[0]["steps"][4 * epoch - 1] for epoch in (2, 3, 4)]
    for name, value in last["state_dict"].items():
        if "running" in name or not value.is_floating_point():
            continue
        torch.testing.assert_close(value, torch.stack([end[name] for end in ends]).mean(0), rtol=1e-12, atol=1e-13)
    assert [group["lr"] for group in last["optimizer_states"][0]["param_groups"]] == [0.01, 0.01]
    # The first layer's input does not depend on the weights before it, so population statistics follow from the images.
    best = ranks[1]["validated"]
    assert all(torch.equal(best[-1][name], value) for name, value in ranks[0]["validated"][-1].items())
    assert torch.equal(best[0]["network.body.0.weight"], ranks[0]["steps"][3]["network.body.0.weight"])  # not averaged
    expected = population(last["state_dict"], epoch=3)
    for name, value in expected.items():
        torch.testing.assert_close(last["state_dict"][name], value, rtol=1e-9, atol=1e-11)


def population(weights: Weights, epoch: int) -> Weights:
    """Mean and unbiased variance of the first layer's output over the images of an epoch's first four batches."""
    data = Digits(batch_size=64, seed=0)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    images = torch.cat([batch[0] for _, batch in zip(range(4), loader, strict=False)]).double().flatten(1)
    outputs = images @ weights["network.body.0.weight"].T
    return {
        "network.body.1.running_mean": outputs.mean(0),
        "network.body.1.running_var": outputs.var(0, correction=1),
    }


def test_half_precision_does_not_swallow_the_average() -> None:
    module = pl.LightningModule()
    module.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = EMA(0.999)
    average.update(module)
    module.weight.data.fill_(2.0)
    for _ in range(1000):
        average.update(module)
    torch.testing.assert_close(average.average["weight"], torch.full((3,), 2 - 0.999**1000), rtol=1e-4, atol=0)
    checkpoint = {"state_dict": module.state_dict()}
    average.on_save_checkpoint(None, module, checkpoint)  # type: ignore[arg-type]
    assert checkpoint["state_dict"]["weight"].dtype is torch.bfloat16
    assert checkpoint["averaging_state"]["average"]["weight"].dtype is torch.float32


def test_a_run_tests_the_average_and_weights_only_takes_it(tmp_path: Path) -> None:
    quick = ["model=mlp", "logger=csv", "trainer.max_epochs=2", "trainer.devices=1", "++trainer.limit_train_batches=6"]
    own = train(
        tmp_path, *quick, "run.id=a", "averaging.ema=0.8", "averaging.bn_batches=4", "precise_batches=4"
    ).ended()
    result, best = own.json("result"), torch.load(own.json("result")["checkpoint"], weights_only=True)
    options = ["mode=test", f"ckpt_path={result['checkpoint']}", "logger=csv", "precise_batches=4", "run.id=t"]
    alone = train(tmp_path, *options).ended().json("result")  # without averaging
    assert alone["test"] == pytest.approx(result["test"], rel=1e-6)
    # The statistics of best.ckpt were measured with its weights, so measuring them again changes little.
    assert alone["precise"]["precise/acc"] == pytest.approx(alone["test"]["test/acc"], abs=0.03)
    name = "network.body.0.weight"
    assert not torch.equal(best["state_dict"][name], best["current_model_state"][name])
    more = ["run.id=b", f"ckpt_path={result['checkpoint']}", "ckpt_restore=weights", "optimizer.lr=0", "test=false"]
    begun = train(tmp_path, *quick, *more).ended()
    last = torch.load(begun.directory / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[operator]
    assert torch.equal(last["state_dict"][name], best["state_dict"][name])
    assert "current_model_state" not in last


def test_without_averaging_a_resumed_run_continues_from_the_raw_weights() -> None:
    module = pl.LightningModule()
    module.weight = torch.nn.Parameter(torch.zeros(2))
    checkpoint = {"state_dict": {"weight": torch.ones(2)}, "current_model_state": {"weight": torch.full((2,), 3.0)}}
    for stage, expected in ((TrainerFn.TESTING, 0.0), (TrainerFn.FITTING, 3.0)):
        trainer = SimpleNamespace(state=SimpleNamespace(fn=stage))
        WeightAverage().on_load_checkpoint(trainer, module, checkpoint)  # type: ignore[arg-type]
        assert module.weight.tolist() == [expected] * 2


@pytest.mark.parametrize(
    ("saved", "loading", "continues"),
    [
        (EMA(0.9), EMA(0.5), True),
        (EMA(0.9), SWA(2), False),
        (SWA(2), EMA(0.9), False),
        (SWA(2), SWA(2), True),
        (SWA(2), SWA(4), False),  # swa_from=0.5, and more epochs
        (SWA(2), WeightAverage(), False),
    ],
)
def test_only_an_average_of_the_same_kind_is_continued(
    saved: WeightAverage, loading: WeightAverage, continues: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    module = pl.LightningModule()
    module.weight = nn.Parameter(torch.ones(2))
    saved.update(module)
    module.weight.data.fill_(3.0)
    checkpoint = {"state_dict": module.state_dict()}
    saved.on_save_checkpoint(None, module, checkpoint)  # type: ignore[arg-type]
    new = pl.LightningModule()
    new.weight = nn.Parameter(torch.zeros(2))
    trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), is_global_zero=True)
    loading.on_load_checkpoint(trainer, new, checkpoint)  # type: ignore[arg-type]
    assert new.weight.tolist() == [3.0, 3.0]
    assert (loading.updates, bool(loading.average)) == ((saved.updates, True) if continues else (0, False))
    says = not continues and type(loading) is not WeightAverage
    assert ("a new average begins" in capsys.readouterr().out) is says


class Normalized(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@QUIET
@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
@pytest.mark.parametrize("average", [lambda: SWA(1, bn_batches=None), lambda: EMA(0.8, bn_batches=5)])
def test_a_checkpoint_without_a_validation_has_measured_statistics(
    tmp_path: Path, average: Any, options: dict[str, int]
) -> None:
    data = TensorDataset(torch.randn(40, 3, dtype=torch.float64) + 2, torch.randint(2, (40,)))
    saving = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    callback, plain = average(), Normalized()
    module = Normalized()
    for each, callbacks in ((plain, ()), (module, (saving, callback))):
        trainer = quiet_trainer(*callbacks, max_epochs=3, enable_checkpointing=bool(callbacks), **options)
        trainer.fit(each, train_loader(data, 8, seed=3), DataLoader(data, 40))
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    weights = last["state_dict"]
    x = F.linear(data.tensors[0], weights["net.0.weight"], weights["net.0.bias"])
    torch.testing.assert_close(weights["net.1.running_mean"], x.mean(0))
    torch.testing.assert_close(weights["net.1.running_var"], x.var(0))
    for name, value in plain.state_dict().items():
        assert torch.equal(last["current_model_state"][name], value), name  # training has not noticed


def test_batches_to_measure_are_those_of_the_loader_where_it_joins_them() -> None:
    settings = {"ema": None, "swa_from": 2, "swa_lr": None, "bn_batches": 6}
    assert build(settings, 4, per_rank=False, batches_at_once=3).bn_batches == 2
    assert build(settings | {"bn_batches": None}, 4, per_rank=False, batches_at_once=3).bn_batches is None
    assert build(settings | {"bn_batches": 0}, 4, per_rank=False, batches_at_once=3).bn_batches == 0
