"""Population statistics: those of all samples, however they were cut into batches and dealt to ranks."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import syncbn
from syncbn.nn.population_statistics import MeasurementError
from syncbn.nn.simulation import simulate
from syncbn.training import PreciseStatistics, SyncBatchNormPlugin, precise_statistics
from syncbn.training.data.loaders import second_loader, train_loader
from syncbn.training.errors import AgreedError
from syncbn.training.evaluation.precise_statistics import _synchronized
from tests.support.ranks import Ranks, messages
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET, quiet_trainer
from tests.training.support.train_command import train

CUTS = {1: [[5], [2], [7]], 2: [[3, 4], [0, 6], [2, 5], [4, 4]], 3: [[2, 3, 4], [5, 0, 2], [2, 6, 3]]}
EPS = 1e-5
Shares = Callable[[list[Tensor]], list[list[Tensor]]]  # the pieces of a batch, by rank -> those that share statistics


def a_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2))
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2)
        net[4].running_mean.fill_(100.0)  # to be forgotten
    return net.double()


def batches(cuts: list[list[int]]) -> list[list[Tensor]]:
    """Batches in pieces, by rank; batches and samples differ in mean and scale."""
    generator = torch.Generator().manual_seed(1)
    wholes = [torch.randn(sum(cut), 3, generator=generator, dtype=torch.float64) for cut in cuts]
    wholes = [whole * (i + 1) + torch.arange(len(whole)).unsqueeze(1) for i, whole in enumerate(wholes)]
    return [list(whole.split(cut)) for whole, cut in zip(wholes, cuts, strict=True)]


def everyone(pieces: list[Tensor]) -> list[list[Tensor]]:
    return [pieces]


def each_alone(pieces: list[Tensor]) -> list[list[Tensor]]:
    return [[piece] for piece in pieces]


def two_and_one(pieces: list[Tensor]) -> list[list[Tensor]]:
    return [pieces[:2], pieces[2:]]


def twos(pieces: list[Tensor]) -> list[list[Tensor]]:
    """Ghost batches of two; the rest joins the last."""
    whole = [piece for piece in pieces if len(piece)]
    return [[part] for piece in whole for part in piece.tensor_split(tuple(range(2, len(piece) - 1, 2)))]


def population(net: nn.Sequential, cuts: list[list[int]], shares: Shares) -> list[Tensor]:
    """Mean and unbiased variance of what each of the two layers sees, all samples laid side by side."""
    first, second = [], []
    for pieces in batches(cuts):
        for together in shares(pieces):
            x = net[0](torch.cat(together))
            if len(x) == 0:
                continue
            first.append(x)
            var, mean = torch.var_mean(x, 0, correction=0)
            second.append(net[3]((x - mean) / (var + EPS).sqrt() * net[1].weight + net[1].bias))
    return [moment for seen in (torch.cat(first), torch.cat(second)) for moment in (seen.mean(0), seen.var(0))]


def state(net: nn.Module) -> list[Tensor]:
    return [statistic for layer in (net[1], net[4]) for statistic in (layer.running_mean, layer.running_var)]


def measure(rank: int, world_size: int, net: nn.Sequential, groups: list[Any], cuts: list[list[int]]) -> list[Tensor]:
    if groups:
        group = dist.new_subgroups_by_enumeration([[0, 1], [2]])[0] if groups[rank] == "pair or rest" else groups[rank]
        syncbn.convert(net, group=group)
    precise_statistics(net, (pieces[rank] for pieces in batches(cuts)))
    return state(net)


MODES = {
    "sync": (3, everyone, ["world"] * 3, {}),
    "local": (3, each_alone, [], {}),
    "groups": (3, two_and_one, ["pair or rest"] * 3, {}),
    "ghost": (2, twos, [], {"ghost_batch": 2}),
    "sync of 2": (2, everyone, ["world"] * 2, {}),
    "one process": (1, everyone, [], {}),
}


@pytest.mark.parametrize(("name", "sharing"), [("local", 1), ("sync", 3)])
def test_simulated_devices_are_measured_as_devices_and_all_of_them_keep_it(name: str, sharing: int) -> None:
    _, shares, *_ = MODES[name]
    cuts = [[3, 3, 3], [2, 2, 2]]
    net = simulate(a_net(), 3, sharing=sharing, keep="each")
    precise_statistics(net, [torch.stack(pieces, 1).flatten(0, 1) for pieces in batches(cuts)])
    torch.testing.assert_close(state(net), population(a_net(), cuts, shares))
    for layer in (net[1], net[4]):
        for rows, running in zip(layer.rows, (layer.running_mean, layer.running_var), strict=True):
            assert torch.equal(rows, running.expand(3, -1))


@pytest.mark.parametrize("mode", MODES)
def test_they_are_those_of_all_samples(ranks: Ranks, mode: str) -> None:
    world_size, shares, groups, options = MODES[mode]
    cuts = CUTS[world_size]
    net = a_net()
    expected = population(net, cuts, shares)
    if options:
        syncbn.convert(net, **options)
    results = ranks.run(measure, net, groups, cuts, world_size=world_size)
    for result in results:
        for got, right, rank_0s in zip(result, expected, results[0], strict=True):
            torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
            assert torch.equal(got, rank_0s)


def both_ways(rank: int, world_size: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The published helper's variance: it undoes the layer's n / (n - 1) with the n of this rank alone."""
    layer = syncbn.SyncBatchNorm1d(1, momentum=1.0)
    mine = x[2 * rank : 2 * rank + 2]
    layer(mine)
    published = layer.running_var * (len(mine) - 1) / len(mine)
    precise_statistics(layer, [mine])
    return published, layer.running_var


def test_the_count_is_that_of_all_ranks_where_the_published_helper_takes_the_ranks_own(ranks: Ranks) -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 6.0, 6.0, 9.0]).unsqueeze(1)
    biased, unbiased = x.var(correction=0), x.var()
    for published, ours in ranks.run(both_ways, x, world_size=3):
        assert published.item() == pytest.approx(0.6 * biased.item())  # (1 / 2) / (5 / 6)
        assert ours.item() == pytest.approx(unbiased.item())


def test_a_layer_that_keeps_the_biased_variance_gets_it() -> None:
    layer, x = syncbn.SyncBatchNorm1d(3, biased_running_var=True).double(), batches([[6]])[0][0]
    precise_statistics(layer, [x[:2], x[2:]])
    torch.testing.assert_close(layer.running_var, x.var(0, correction=0))


def count(rank: int, world_size: int, sync: bool) -> tuple[list[str], list[Tensor]]:
    net = syncbn.convert(a_net()) if sync else a_net()
    pieces = [pieces[rank] for pieces in batches(CUTS[2])]
    wrapped = DistributedDataParallel(net)
    with messages() as sent:
        precise_statistics(wrapped, pieces)
    return sent.operations, state(net)


@pytest.mark.parametrize("sync", [True, False])
def test_one_message_besides_the_layers_own(ranks: Ranks, sync: bool) -> None:
    expected = population(a_net(), CUTS[2], everyone if sync else each_alone)
    for operations, result in ranks.run(count, sync, world_size=2):
        assert operations == ["allreduce"] * (2 * len(CUTS[2]) * sync + 1)
        torch.testing.assert_close(result, expected)


def give_none(rank: int, world_size: int) -> str:
    try:
        precise_statistics(a_net(), [torch.empty(0, 3, dtype=torch.float64)] * rank)
    except MeasurementError as error:
        return str(error)
    return ""


def test_no_sample_at_all_is_refused_on_every_rank(ranks: Ranks) -> None:
    for line in ranks.run(give_none, world_size=2):
        assert line == "precise statistics: no sample came through a batch norm layer; give at least one batch"


class Stateful(nn.Module):
    """Draws, and counts in a buffer, whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + 0 * torch.rand(())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_else_changes(fails: bool) -> None:
    net = nn.Sequential(a_net(), Stateful())
    frozen = nn.BatchNorm1d(2).double().eval()
    net.append(frozen)
    pieces = [pieces[0] for pieces in batches(CUTS[1])]
    net(pieces[0]).square().sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [p.grad.clone() for p in net.parameters()]
    flags = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    data = [*pieces, torch.zeros(3, 9, dtype=torch.float64)] if fails else pieces
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            precise_statistics(net, data)
    else:
        precise_statistics(net, data)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    names = {f"0.{layer}.running_{what}" for layer in (1, 4) for what in ("mean", "var")}
    assert moved == (set() if fails else names)
    assert [module.training for module in net.modules()] == flags
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_model_in_evaluation_mode_is_measured_as_in_training() -> None:
    net, expected = a_net().eval(), population(a_net(), CUTS[1], everyone)
    precise_statistics(net, [(pieces[0], "a target") for pieces in batches(CUTS[1])])
    torch.testing.assert_close(state(net), expected)
    assert not net[1].training


def test_num_batches_and_only_leave_the_rest_alone() -> None:
    net, expected = a_net(), population(a_net(), CUTS[1][:2], everyone)
    data = iter([pieces[0] for pieces in batches(CUTS[1])])
    precise_statistics(net, data, num_batches=2, only="1")
    torch.testing.assert_close(state(net)[:2], expected[:2])
    assert state(net)[2].eq(100).all()
    assert len(list(data)) == 1


def test_a_layer_that_was_told_to_stop_tracking_keeps_what_it_has() -> None:
    net = a_net()
    net[1].track_running_stats = False
    before = [statistic.clone() for statistic in state(net)]
    precise_statistics(net, [pieces[0] for pieces in batches(CUTS[1])], 3)
    assert [torch.equal(was, now) for was, now in zip(before, state(net), strict=True)] == [True, True, False, False]


def test_a_layer_that_runs_twice_has_both_inputs_and_one_that_does_not_run_keeps_what_it_has() -> None:
    shared, idle, x = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double(), batches([[6]])[0][0]
    idle.running_mean.fill_(7)
    net = nn.ModuleList([shared, idle])
    precise_statistics(net, [x], forward=lambda batch: (shared(batch[:2]), shared(10 * batch[2:])))
    both = torch.cat([x[:2], 10 * x[2:]])
    torch.testing.assert_close((shared.running_mean, shared.running_var), (both.mean(0), both.var(0)))
    assert idle.running_mean.eq(7).all()


def test_what_is_masked_does_not_count() -> None:
    layer, x = syncbn.SyncBatchNorm1d(3).double(), batches([[6]])[0][0]
    keep = torch.arange(6) % 3 > 0
    precise_statistics(layer, [x], forward=lambda batch: layer(batch, mask=keep))
    torch.testing.assert_close((layer.running_mean, layer.running_var), (x[keep].mean(0), x[keep].var(0)))


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: precise_statistics(a_net(), [], num_batches=0), "num_batches=0: use a whole number, 1 or more"),
        (lambda: precise_statistics(nn.Linear(2, 2), []), "there is no batch norm layer to measure"),
        (lambda: precise_statistics(nn.BatchNorm1d(2, track_running_stats=False), []), "no batch norm layer"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Callable[[], object], line: str) -> None:
    with pytest.raises(MeasurementError, match=line):
        call()


@pytest.mark.parametrize("name", ["num_batches", "every_n_epochs"])
def test_a_number_below_one_is_refused(name: str) -> None:
    with refuses(f"PreciseStatistics.{name}", 0, "use a whole number, 1 or more"):
        PreciseStatistics(**{name: 0})


@pytest.mark.parametrize(
    ("loader", "kind"),
    [
        ([1, 2], "(list)"),
        (DataLoader(TensorDataset(torch.zeros(4)), sampler=WeightedRandomSampler([1.0], 1)), "(DataLoader)"),
        (DataLoader(TensorDataset(torch.zeros(4)), batch_sampler=[[0, 1]]), "(DataLoader)"),
    ],
)
def test_training_data_that_cannot_be_read_a_second_time_are_refused(loader: Any, kind: str) -> None:
    with refuses("PreciseStatistics", None, "no second loader", kind, "; give it batches=", kind=AgreedError):
        second_loader(loader)


@QUIET
def test_a_module_without_batch_norm_is_refused_when_it_is_measured() -> None:
    with refuses("precise statistics", None, "there is no batch norm layer to measure"):
        fit(LOADERS["ours"](), PreciseStatistics(5, only="nothing"))


def a_set() -> TensorDataset:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return TensorDataset(x + torch.arange(40).unsqueeze(1) / 10, (x.sum(1) > 0).long())


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = a_net()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.seen.append(torch.cat(state(self.net)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


LOADERS = {
    "ours": partial(train_loader, a_set(), 8, seed=3),
    "a user's": lambda: DataLoader(a_set(), 8, shuffle=True, drop_last=True),
}


def fit(loader: Any, *callbacks: pl.Callback, **options: Any) -> tuple[Module, Tensor]:
    torch.manual_seed(4)
    options = {"max_epochs": 2, "val_check_interval": 2} | options
    module = Module()
    quiet_trainer(*callbacks, num_sanity_val_steps=1, **options).fit(module, loader, DataLoader(a_set(), 40))
    return module, torch.get_rng_state()


@pytest.mark.parametrize("loader", LOADERS)
@QUIET
def test_the_callback_measures_before_each_validation_and_training_is_bitwise_the_same(loader: str) -> None:
    plain, random = fit(LOADERS[loader]())
    precise, random_too = fit(LOADERS[loader](), PreciseStatistics(5))
    assert torch.equal(random, random_too)
    for mine, theirs in zip(plain.parameters(), precise.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert len(precise.seen) == 5  # the sanity check, and twice an epoch
    assert torch.equal(precise.seen[0], plain.seen[0])
    # All 40 samples are measured: only the first layer's inputs do not depend on the order.
    x = a_set().tensors[0]
    for step, (seen, running) in enumerate(zip(precise.seen[1:], plain.seen[1:], strict=True)):
        assert not torch.allclose(seen, running, rtol=1e-3), step
    final = precise.net[0](x).detach()
    torch.testing.assert_close(state(precise.net)[:2], [final.mean(0), final.var(0)])


@QUIET
def test_without_epochs_it_measures_at_the_end_alone() -> None:
    plain, _ = fit(LOADERS["ours"]())
    precise, _ = fit(LOADERS["ours"](), PreciseStatistics(5, every_n_epochs=None))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain.seen, precise.seen, strict=True))
    final = precise.net[0](a_set().tensors[0]).detach()
    torch.testing.assert_close(state(precise.net)[:2], [final.mean(0), final.var(0)])


@QUIET
@pytest.mark.parametrize("last", [{}, {"max_epochs": -1, "max_steps": 8}])
def test_the_last_checkpoint_has_what_is_measured_at_the_end(tmp_path: Path, last: dict[str, int]) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    options = {"val_check_interval": 1.0, "enable_checkpointing": True} | last
    precise, _ = fit(LOADERS["ours"](), saving, PreciseStatistics(5, every_n_epochs=None), **options)
    saved = [
        torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]["net.1.running_mean"]
        for epoch in (0, 1)
    ]
    assert not torch.allclose(saved[0], precise.net[1].running_mean, rtol=1e-2)
    assert torch.equal(saved[1], precise.net[1].running_mean)
    torch.testing.assert_close(saved[1], precise.net[0](a_set().tensors[0]).detach().mean(0))


class Stop(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = True


@QUIET
@pytest.mark.parametrize("least", [{"min_epochs": 2}, {"min_steps": 6}])
def test_an_early_stop_ends_training_after_the_least_epochs_and_steps(tmp_path: Path, least: dict[str, int]) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    options = {"val_check_interval": 1.0, "enable_checkpointing": True, "max_epochs": 5} | least
    precise, _ = fit(LOADERS["ours"](), saving, Stop(), PreciseStatistics(5, every_n_epochs=None), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    first, last = (torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"] for epoch in (0, 1))
    x = a_set().tensors[0]
    torch.testing.assert_close(last["net.1.running_mean"], precise.net[0](x).detach().mean(0))
    expected = x @ first["net.0.weight"].T + first["net.0.bias"]
    assert not torch.allclose(first["net.1.running_mean"], expected.mean(0), rtol=1e-2)


class Doubles:
    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [2 * batch[0], *batch[1:]]


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return LOADERS["ours"]()

    def val_dataloader(self) -> Any:
        return DataLoader(a_set(), 40)


@QUIET
@pytest.mark.filterwarnings("ignore:You have overridden `on_before_batch_transfer`")
@pytest.mark.parametrize("owner", ["datamodule", "module", "both", "neither"])
def test_the_batches_pass_the_hook_that_lightning_calls_before_their_transfer(owner: str) -> None:
    kinds = {
        base: type(base.__name__, (Doubles, base), {}) if owner in (name, "both") else base
        for name, base in (("datamodule", Data), ("module", Module))
    }
    module = kinds[Module]()
    quiet_trainer(PreciseStatistics(5, every_n_epochs=None), max_epochs=1).fit(module, datamodule=kinds[Data]())
    factor = 1 if owner == "neither" else 2  # "both": Lightning calls the datamodule's alone
    found = module.net[0](factor * a_set().tensors[0]).detach().mean(0)
    torch.testing.assert_close(module.net[1].running_mean, found)


@QUIET
@pytest.mark.parametrize(
    ("callback", "why"),
    [
        (EarlyStopping("loss"), "EarlyStopping may end training at any epoch, "),
        (ModelCheckpoint(save_on_train_epoch_end=False), "ModelCheckpoint saves with validations"),
    ],
)
def test_what_would_be_saved_without_them_is_refused(tmp_path: Path, callback: pl.Callback, why: str) -> None:
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    if isinstance(callback, EarlyStopping):
        options["enable_checkpointing"] = False
    with refuses("PreciseStatistics.every_n_epochs", None, why, "; use every_n_epochs=1", kind=AgreedError):
        fit(LOADERS["ours"](), callback, PreciseStatistics(5, every_n_epochs=None), **options)


def test_its_loader_leaves_the_place_of_the_training_loader_alone() -> None:
    loader = LOADERS["ours"]()
    training = iter(loader)
    next(training)
    own = second_loader(loader)
    own.sampler.set_position(7, 0)
    for _ in own:
        pass
    next(training)
    assert loader.state_dict() == {"epoch": 0, "batch": 2}


def test_before_a_test_layers_are_synchronized_as_in_training_and_not_after() -> None:
    """Lightning synchronizes layers while it fits alone."""
    plugin, net = SyncBatchNormPlugin(1, ghost_batch=2), a_net()
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(_layer_sync=plugin))
    with _synchronized(trainer, net):
        precise_statistics(net, [pieces[0] for pieces in batches(CUTS[1])])
    torch.testing.assert_close(state(net), population(a_net(), CUTS[1], twos))
    assert type(net[1]) is nn.BatchNorm1d


QUICK = ["model=mlp", "logger=csv", "trainer.max_epochs=1", "+trainer.limit_train_batches=8", "precise_batches=12"]


def test_a_run_tests_once_more_alike_on_one_and_on_two_devices(tmp_path: Any) -> None:
    results = []
    for devices in (1, 2):
        where = tmp_path / str(devices)
        where.mkdir()
        run = train(where, *QUICK, "data.global_batch_size=32", f"trainer.devices={devices}")
        assert run.code == 0, run.err
        assert "precise accuracy" in run.out
        results.append(run.json("result"))
        with (run.directory / "metrics.csv").open(encoding="utf-8") as file:
            rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        assert rows[-1] == {"step": rows[-2]["step"]} | {k: str(v) for k, v in results[-1]["precise"].items()}
        assert rows[-2].keys() >= {"test/acc", "test/loss"}
    one, two = results
    assert one["precise"].keys() == {"precise/acc", "precise/loss", "precise/count"}
    assert one["precise"]["precise/count"] == 360
    assert two["precise"] == pytest.approx(one["precise"], rel=1e-4)
    assert abs(one["precise"]["precise/loss"] - one["test"]["test/loss"]) > 0.01
