"""StatisticsMonitor: its figures against the definition in numpy, what it sends, and its file in real runs."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import syncbn
from syncbn.nn import statistics
from syncbn.nn.comm import observer
from syncbn.nn.statistics import Moments
from syncbn.training import StatisticsMonitor
from syncbn.training.callbacks import device_spread
from syncbn.training.callbacks.step_probe import StepProbe
from syncbn.training.loggers.csv_logger import MetricsFile
from tests.support.ranks import Messages, Ranks, messages
from tests.support.refuses import refuses
from tests.training.support.faulty_runs import fault, faulty
from tests.training.support.plain_lightning import QUIET, Kept, as_of_torchrun, free_port, quiet_trainer
from tests.training.support.train_command import Run

C = 5
NAN = float("nan")

pytestmark = QUIET


def drawn(sizes: list[int], seed: int = 0, channels: int = C, by: float = 0.0) -> list[np.ndarray]:
    """The values of each device, ``(n_r, C)`` in float64, which differ in mean by ``by`` standard deviations."""
    random = np.random.default_rng(seed)
    scale, offset = random.uniform(0.5, 3, channels), random.normal(size=channels)
    return [scale * (random.normal(size=(n, channels)) + by * r) + offset for r, n in enumerate(sizes)]


def by_definition(devices: list[np.ndarray]) -> tuple[float, float, float]:
    """Spread, effective batch and variance ratio, from the values themselves."""
    devices = [values for values in devices if len(values)]
    together = np.concatenate(devices)
    varies = together.std(axis=0) > 0
    k, n, sizes = len(devices), len(together), np.array([len(values) for values in devices])
    standard = [(values - together.mean(axis=0))[:, varies] / together.std(axis=0)[varies] for values in devices]
    per_device = np.stack([values.mean(axis=0) ** 2 / (1 / len(values) - 1 / n) for values in standard])
    spread = np.average(per_device.mean(axis=1), weights=1 - sizes / n) * (n - 1) / n
    within = sum(((values - values.mean(axis=0)) ** 2).sum(axis=0) for values in standard).mean()
    between = sum(len(values) * values.mean(axis=0) ** 2 for values in standard).mean()
    n0 = (n - (sizes**2).sum() / n) / (k - 1)
    component = (between / (k - 1) - within / (n - k)) / n0
    return spread, (within / (n - k) + component) / (between / (k - 1) / n0), within / n


def figures_of(devices: list[np.ndarray]) -> device_spread.Figures | None:
    shares, layers = [], device_spread.Layers([3, C])  # the first of them does not run
    for values in devices:
        n = torch.tensor(float(len(values)), dtype=torch.float64)
        mean, var = (torch.from_numpy(f(axis=0)) if len(values) else torch.zeros(C) for f in (values.mean, values.var))
        shares.append(layers.share([None, statistics.pack(Moments(n, mean, var))], [None, n.reshape(1)]))
    nothing, found = layers.figures(torch.stack(shares).sum(0))
    assert nothing is None
    return found


SIZES = [[8, 8], [2, 7], [5, 0, 3], [6, 4, 11]]


@pytest.mark.parametrize("by", [0.0, 2.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_figures_are_those_of_the_definition(sizes: list[int], by: float) -> None:
    devices = drawn(sizes, by=by)
    found = figures_of(devices)
    assert found is not None
    assert found.device_batch == found.group_batch == sum(sizes) / sum(n > 0 for n in sizes)
    np.testing.assert_allclose(found[2:], by_definition(devices), rtol=1e-10)


def test_dealing_the_same_values_out_at_random_gives_a_spread_of_exactly_one_on_average() -> None:
    # All deals of 6 values, of any distribution, to devices of 2 and 4.
    values = drawn([6])[0] ** 3
    first = [(i, j) for i in range(6) for j in range(i)]
    deals = [figures_of([values[list(one)], np.delete(values, one, axis=0)]) for one in first]
    assert np.mean([found.spread for found in deals if found]) == pytest.approx(1, abs=1e-12)
    assert np.mean([found.variance_ratio for found in deals if found]) == pytest.approx((6 - 2) / (6 - 1), abs=1e-12)


def over_draws(make: Any) -> tuple[float, float]:
    """Mean spread, and harmonic mean of the effective batch."""
    found = [figures_of(make(seed)) for seed in range(300)]
    return float(np.mean([f.spread for f in found if f])), 1 / float(
        np.mean([1 / f.effective_batch for f in found if f])
    )


def test_independent_samples_have_spread_1_and_are_worth_themselves() -> None:
    spread, effective = over_draws(lambda seed: drawn([16, 16, 16], seed))
    assert spread == pytest.approx(1, rel=0.06)
    assert effective == pytest.approx(16, rel=0.06)


def test_each_sample_twice_is_worth_half() -> None:
    spread, effective = over_draws(lambda seed: [np.repeat(values, 2, axis=0) for values in drawn([8, 8, 8], seed)])
    assert spread == pytest.approx(2, rel=0.07)
    assert effective == pytest.approx(8, rel=0.07)


def test_devices_with_a_domain_each_show_it() -> None:
    # Means 0 and d, variance 1: the total variance is 1 + d^2/4, and of it d^2/4 lies between the two.
    d, n = 6.0, 64
    found = figures_of(drawn([n, n], by=d))
    share = (d * d / 4) / (1 + d * d / 4)
    assert found is not None
    assert found.spread == pytest.approx(share * (2 * n - 1), rel=0.05)
    assert found.variance_ratio == pytest.approx(1 - share, rel=0.15)
    assert found.effective_batch == pytest.approx((1 + d * d / 2) / (d * d / 2), rel=0.1)  # components 1 and d^2/2
    alone = figures_of([np.full((4, C), 1.0), np.full((4, C), 2.0)])
    assert alone is not None
    np.testing.assert_allclose(alone[2:], [7.0, 1.0, 0.0], atol=1e-12)


def test_a_channel_that_does_not_vary_is_left_out() -> None:
    devices = drawn([4, 6], seed=3)
    for values in devices:
        values[:, 2] = np.float32(0.1)
    found = figures_of(devices)
    assert found is not None
    np.testing.assert_allclose(found[2:], by_definition([np.delete(v, 2, axis=1) for v in devices]), rtol=1e-10)


def test_what_cannot_be_told_is_not_told() -> None:
    assert figures_of([np.zeros((0, C)), np.zeros((0, C))]) is None
    for devices in (drawn([0, 7]), [np.full((3, C), 0.1), np.full((4, C), 0.1)]):
        found = figures_of(devices)
        assert found is not None
        np.testing.assert_equal(found[2:], (NAN, NAN, NAN))
    same = drawn([4])[0]
    found = figures_of([same, same])
    assert found is not None
    np.testing.assert_allclose(found[2:], (0, NAN, 1), atol=1e-12)


# On ranks, in steps of the layer itself


class Net(nn.Module):
    """A layer that runs twice, one of each kind, one that does not run, one that does not train."""

    def __init__(self, pair: object, saving: bool) -> None:
        super().__init__()
        self.shared, self.sync = syncbn.SyncBatchNorm2d(C), syncbn.SyncBatchNorm2d(C)
        self.pair = syncbn.SyncBatchNorm2d(C, group=pair)
        self.alone, self.local = syncbn.SyncBatchNorm2d(C, group=1), nn.BatchNorm2d(C)
        self.ghost, self.unused = syncbn.SyncBatchNorm2d(C, ghost_batch=2), nn.BatchNorm2d(C)
        self.frozen = nn.BatchNorm2d(C).eval()
        self.saving = saving

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.shared, self.sync, self.pair, self.alone, self.local, self.ghost, self.frozen)
        if self.saving:
            return self.shared(sum(checkpoint(layer, x, use_reentrant=False) for layer in layers))
        return self.shared(sum(layer(x) for layer in layers))


class Probed(NamedTuple):
    total: Tensor
    sent: Messages
    places: list[str]


def probe_one_step(rank: int, world_size: int, pieces: list[Tensor], saving: bool, step: int = 0) -> Probed:
    pair, _ = dist.new_subgroups_by_enumeration([[0, 1], [2]][: world_size - 1])
    net, x = Net(pair, saving).double(), pieces[rank].requires_grad_()
    layers = dict(syncbn.nn.conversion.convert.batch_norms(net))
    for name, layer in layers.items():
        if isinstance(layer, syncbn.nn.modules.Synchronized):
            layer.name_in_model = name
    probe = StepProbe(layers, torch.device("cpu"))
    try:
        with messages() as sent:
            for _ in range(2):  # two batches of a step: the first counts
                net(x).sum().backward()
                x = x.detach().square().requires_grad_()
    finally:
        probe.close()
    assert not any(layer._forward_pre_hooks for layer in layers.values())
    assert observer.observer is None
    total = probe.summary(device_spread.Layers([C] * len(layers)))
    dist.all_reduce(total)
    return Probed(total, sent, [place for place, *_ in probe._spans])


NAMES = ("shared", "sync", "pair", "alone", "local", "ghost", "unused", "frozen")


@pytest.mark.parametrize("saving", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("sizes", [[3, 5], [2, 0, 4]], ids=str)
def test_each_kind_of_layer_is_seen_once(ranks: Ranks, sizes: list[int], saving: bool) -> None:
    devices = drawn([6 * n for n in sizes], by=0.2)
    pieces = [torch.from_numpy(values).reshape(-1, 2, 3, C).movedim(-1, 1) for values in devices]
    probed = ranks.run(probe_one_step, pieces, saving, world_size=len(sizes))
    assert all(torch.equal(each.total, probed[0].total) for each in probed)
    times, total = probed[0].total.tensor_split([len(NAMES) + 2])
    found = dict(zip(NAMES, device_spread.Layers([C] * len(NAMES)).figures(total), strict=True))
    assert found["unused"] is found["frozen"] is None
    values, own = 6 * sum(sizes), 6 * sum(sizes) / sum(n > 0 for n in sizes)
    groups = {"shared": [values], "sync": [values], "alone": [own], "local": [own]}
    groups["ghost"] = [6 * n / max(n // 2, 1) for n in sizes if n]
    groups["pair"] = [6 * (sum(sizes[:2]) if rank < 2 else n) for rank, n in enumerate(sizes) if n]
    for name, shared in groups.items():
        figures = found[name]
        assert figures is not None, name
        assert figures[:2] == pytest.approx((own, np.mean(shared))), name
        np.testing.assert_allclose(figures[2:], by_definition(devices), rtol=1e-8, err_msg=name)
    # The shared layer runs twice in each of two batches, and once more each time that it is recomputed.
    step, spent, *seconds = times.tolist()
    assert sum(seconds) == pytest.approx(spent)
    assert 0 < spent < step
    assert [name for name, each in zip(NAMES, seconds, strict=True) if each > 0] == ["shared", "sync", "pair"]
    for rank, each in enumerate(probed):
        pair = rank < 2
        assert len(each.sent) == len(each.places) == 2 * (6 + 2 * pair + (2 + pair) * saving)
        assert each.places.count("shared backward") == 4
        assert each.places.count("shared forward") == 4 + 2 * saving


def selective(rank: int, world_size: int, pieces: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients with selective checkpointing, and without a look and with one; and what was seen."""
    gradients, layer = [], syncbn.SyncBatchNorm2d(C).double()
    layer.name_in_model = "layer"
    for looking in (False, True):
        probe = StepProbe({"layer": layer}, torch.device("cpu"))
        if not looking:
            probe.close()
        x = pieces[rank].clone().requires_grad_()
        checkpoint(layer, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts).pow(3).sum().backward()
        probe.close()
        gradients.append(x.grad)
    return gradients, list(probe._seen.values())


def test_a_look_is_not_in_the_way_of_selective_checkpointing(ranks: Ranks) -> None:
    pieces = [torch.randn(n, C, 2, 2, dtype=torch.float64) for n in (3, 2)]
    for (without, with_probe), seen in ranks.run(selective, pieces, world_size=2):
        assert torch.equal(without, with_probe)
        assert len(seen) == 1


def test_a_residual_is_not_taken_for_a_mask() -> None:
    layer = syncbn.SyncBatchNorm2d(C, ghost_batch=2)
    probe = StepProbe({"layer": layer}, torch.device("cpu"))
    x = torch.randn(4, C, 3, 3)
    layer(x, residual=x, act="relu")
    probe.close()
    ((sums, _),) = probe._seen.values()
    torch.testing.assert_close(sums[1 : C + 1], x.double().sum((0, 2, 3)))


# In training


class Lit(pl.LightningModule):
    """Layers that all go by SyncBatchNorm1d(5), until they are told apart."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        norms = [syncbn.SyncBatchNorm1d(C) for _ in range(layers)]
        self.body = nn.Sequential(*norms, nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if not batch.isfinite().all():
            raise ValueError("not today")
        return self.body(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Sent(pl.Callback):
    """Counts the messages of each batch, those of callbacks after this one at its start and before it at its end."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.counting: Any = None

    def on_train_batch_start(self, *_: Any) -> None:
        self.counting = messages()
        self.sent = self.counting.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counting.__exit__(None, None, None)
        self.counts.append(len(self.sent))


class Fitted(NamedTuple):
    sent: list[int]
    given: list[tuple[int | None, dict[str, float]]]
    collectives: dict[str, float] | None
    names: list[str]
    error: str


def fit(
    rank: int,
    world_size: int,
    port: int,
    where: str,
    data: list[Any],
    layers: int = 1,
    monitor: Any = None,
    **more: Any,
) -> Fitted:
    """Trains in plain Lightning, in the process group that is there."""
    lit, watching, logger, sent = Lit(layers), StatisticsMonitor(**(monitor or {})), Kept(where), Sent()
    options = {"max_epochs": 1, "log_every_n_steps": 2, "use_distributed_sampler": False} | more
    callbacks = [watching, sent] if monitor is not None else [sent]
    error = ""
    with as_of_torchrun(rank, world_size, port):
        strategy = DDPStrategy() if world_size > 1 else "auto"
        trainer = quiet_trainer(*callbacks, devices=world_size, strategy=strategy, logger=logger, **options)
        try:
            trainer.fit(lit, DataLoader(data[rank], batch_size=None, shuffle=False))
        except ValueError as raised:
            error = str(raised)
            sent.counting.__exit__(None, None, None)
    assert observer.observer is None
    assert not any(module._forward_pre_hooks for module in lit.modules())
    left = [layer.name_in_model for layer in lit.body if isinstance(layer, syncbn.SyncBatchNorm1d)]
    return Fitted(sent.counts, logger.given, watching.collectives, left, error)


def batches(count: int, sizes: list[int]) -> tuple[list[list[Tensor]], list[list[np.ndarray]]]:
    """For each rank its batches; and for each step the devices' values."""
    steps = [drawn(sizes, seed, by=0.5) for seed in range(count)]
    return [[torch.from_numpy(step[rank]).float() for step in steps] for rank in range(len(sizes))], steps


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "statistics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_in_plain_lightning_each_look_is_one_message_and_between_looks_there_is_none(
    ranks: Ranks, tmp_path: Path
) -> None:
    data, steps = batches(6, [4, 7])
    without = ranks.run(fit, free_port(), str(tmp_path), data, 2, world_size=2, fresh=True)
    assert list(tmp_path.iterdir()) == []
    fitted = ranks.run(fit, free_port(), str(tmp_path), data, 2, {}, world_size=2, fresh=True)
    for one, other in zip(without, fitted, strict=True):
        assert [b - a for a, b in zip(one.sent, other.sent, strict=True)] == [0, 1] * 3
        assert other.names == ["", ""]
    assert fitted[1].given == []
    assert [step for step, _ in fitted[0].given] == [1, 3, 5]
    for step, metrics in fitted[0].given:
        spread, effective, _ = by_definition(steps[step])
        assert metrics["statistics/body.0/spread"] == pytest.approx(spread, rel=1e-5)
        assert metrics["statistics/body.0/effective_batch"] == pytest.approx(effective, rel=1e-5)
        assert len(metrics) == 2 * 3 + 1
    shares = [metrics["statistics/collective_share"] for _, metrics in fitted[0].given]
    assert all(0 < share < 1 for share in shares)
    about = fitted[0].collectives
    assert min(shares) <= about["share"] <= max(shares)
    found = rows(tmp_path)
    assert ",".join(found[0]) == "step,layer,device_batch,group_batch,spread,effective_batch,variance_ratio,seconds"
    assert [(row["step"], row["layer"]) for row in found] == [(s, f"body.{i}") for s in "135" for i in (0, 1, 3)]
    seconds = [float(row["seconds"]) for row in found]
    assert [s > 0 for s in seconds] == [True, True, False] * 3
    assert about["seconds_per_step"] == pytest.approx(sum(seconds) / 3)


def test_with_accumulated_gradients_a_look_is_a_step_and_the_first_batch_counts(ranks: Ranks, tmp_path: Path) -> None:
    data, steps = batches(8, [3, 3])
    options = {"accumulate_grad_batches": 2}
    runs = [
        ranks.run(run_with, fit, options, free_port(), str(tmp_path), data, 1, monitor, world_size=2, fresh=True)
        for monitor in (None, {})
    ]
    for one, other in zip(*runs, strict=True):
        assert [b - a for a, b in zip(one.sent, other.sent, strict=True)] == [0, 0, 0, 1] * 2
    found = {int(row["step"]): float(row["spread"]) for row in rows(tmp_path) if row["layer"] == "body.0"}
    assert found == pytest.approx({1: by_definition(steps[2])[0], 3: by_definition(steps[6])[0]}, rel=1e-5)


def test_a_look_ends_where_a_validation_begins_and_none_begins_in_the_midst_of_a_step() -> None:
    loop = SimpleNamespace(_should_accumulate=lambda: True, _batches_that_stepped=0)
    trainer: Any = SimpleNamespace(log_every_n_steps=1, fit_loop=SimpleNamespace(epoch_loop=loop))
    lit, monitor = Lit(1), StatisticsMonitor()
    monitor._layers, monitor._active = dict(syncbn.nn.conversion.convert.batch_norms(lit)), True
    monitor.on_train_batch_start(trainer, lit)
    assert observer.observer is not None
    monitor.on_train_batch_end(trainer, lit)
    monitor.on_validation_start(trainer, lit)
    assert observer.observer is None
    assert not any(module._forward_pre_hooks for module in lit.modules())
    monitor.on_train_batch_start(trainer, lit)
    assert observer.observer is None
    loop._should_accumulate = lambda: False
    monitor.on_train_batch_end(trainer, lit)  # no message: there is no process group
    monitor.on_train_batch_start(trainer, lit)
    assert observer.observer is not None
    monitor.on_train_end()


def run_with(rank: int, world_size: int, fn: Any, options: dict[str, Any], *arguments: Any) -> Any:
    return fn(rank, world_size, *arguments, **options)


def test_an_error_in_the_middle_of_a_look_ends_it(ranks: Ranks, tmp_path: Path) -> None:
    data, _ = batches(2, [3, 3])
    for mine in data:
        mine[1][0] = NAN
    for fitted in ranks.run(fit, free_port(), str(tmp_path), data, 1, {}, world_size=2, fresh=True):
        assert fitted.error == "not today"
        assert fitted.names == [""]


def test_in_one_process_there_is_nothing_to_say(ranks: Ranks, tmp_path: Path) -> None:
    data, _ = batches(4, [5])
    (fitted,) = ranks.run(fit, free_port(), str(tmp_path), data, 1, {"every_n_steps": 1}, world_size=1)
    assert (fitted.given, fitted.collectives, list(tmp_path.iterdir())) == ([], None, [])


def test_of_many_layers_loggers_get_the_extremes_alone(ranks: Ranks, tmp_path: Path) -> None:
    data, _ = batches(1, [4, 4])
    monitor = {"every_n_steps": 1, "directory": str(tmp_path / "there")}
    (tmp_path / "there").mkdir()
    MetricsFile(tmp_path / "there", "statistics.csv").append([{"step": 7, "layer": "of a run that began anew"}])
    fitted, _ = ranks.run(fit, free_port(), str(tmp_path), data, 16, monitor, world_size=2, fresh=True)
    ((step, metrics),) = fitted.given
    found = rows(tmp_path / "there")
    spreads = [float(row["spread"]) for row in found]
    shares = [float(row["effective_batch"]) / float(row["device_batch"]) for row in found]
    assert (step, len(found), fitted.collectives) == (0, 17, None)  # the first step is the warm-up
    assert metrics == pytest.approx(
        {
            "statistics/mean_spread": np.mean(spreads),
            "statistics/max_spread": max(spreads),
            "statistics/min_effective_share": min(shares),
        }
    )


def compiled(rank: int, world_size: int, looks: list[bool]) -> tuple[int, list[str]]:
    """How often a network was compiled in steps with and without a look, and what was seen in it."""
    torch.compiler.reset()
    syncbn.nn.comm.groups.resolve("world")  # or torch would compile once more because it was
    net = nn.Sequential(syncbn.SyncBatchNorm1d(C), nn.BatchNorm1d(C))
    counter, seen = CompileCounter(), []
    fast = torch.compile(net, backend=counter, fullgraph=True)
    for looking in looks:
        probe = StepProbe(dict(syncbn.nn.conversion.convert.batch_norms(net)), torch.device("cpu"))
        if not looking:
            probe.close()
        fast(torch.randn(4, C))
        probe.close()
        seen += probe._seen
    return counter.frame_count, seen


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own doing
@pytest.mark.parametrize(
    ("looks", "frames"),
    [([False, True, False, True], 1), ([True, False, True, False], 2)],  # first compiled with hooks: once more without
    ids=["first without", "first with"],
)
def test_a_compiled_network_is_left_alone(ranks: Ranks, looks: list[bool], frames: int) -> None:
    assert ranks.run(compiled, looks, world_size=2) == [(frames, [])] * 2


@pytest.mark.parametrize("value", [0, -3])
def test_an_interval_that_cannot_be_is_refused(value: int) -> None:
    with refuses("callbacks.statistics.every_n_steps", value, "use 1 or more, or null"):
        StatisticsMonitor(value)


# The program

EVERY = 3


def told(run: Run) -> list[dict[str, str]]:
    assert run.code == 0, run.err
    assert run.directory is not None
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows(run.directory)]


@pytest.mark.parametrize("norm", ["sync", "local"])
def test_a_run_that_is_killed_and_goes_on_tells_what_an_undisturbed_one_tells(tmp_path: Path, norm: str) -> None:
    settings = (f"norm={norm}", "trainer.max_epochs=2", f"trainer.log_every_n_steps={EVERY}", "resume.every_n_steps=7")
    straight = faulty(tmp_path, *settings, "run.id=straight")
    same = (*settings, "run.id=a", fault(tmp_path, "kill_everything", epoch=1, batch=11))
    first = faulty(tmp_path, *same)
    assert first.code == -9
    assert rows(first.directory)[-1]["step"] == "29"  # type: ignore[arg-type]
    second = faulty(tmp_path, *same, f"callbacks.statistics.every_n_steps={EVERY}")  # as it was, said otherwise
    assert "step-00000025.ckpt" in second.out
    assert "with other settings" not in second.out
    assert [row["step"] for row in told(straight)] == [str(step) for step in range(EVERY - 1, 36, EVERY)]
    assert told(second) == told(straight)
    for row in told(straight):
        assert row["layer"] == "network.2"
        assert (float(row["device_batch"]), float(row["group_batch"])) == (32, 64 if norm == "sync" else 32)
        assert float(row["variance_ratio"]) == pytest.approx(1 - float(row["spread"]) / 63)
    spent = [float(row["seconds"]) for row in rows(straight.directory)]  # type: ignore[arg-type]
    assert (min(spent) > 0) == (max(spent) > 0) == (norm == "sync")
    about = straight.json("result")["collectives"]
    assert about["seconds_per_step"] == pytest.approx(np.mean(spent))
    assert (0 < about["share"] < 1) == (norm == "sync")
    with (straight.directory / "metrics.csv").open(encoding="utf-8") as file:  # type: ignore[operator]
        logged = [row for row in csv.DictReader(file) if row["statistics/network.2/spread"]]
    assert [row["step"] for row in logged] == [row["step"] for row in told(straight)]
