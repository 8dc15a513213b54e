"""A loss that is nan: the right step, layer and rank, nothing spoiled, nothing sent."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric

from syncbn.training import (
    NonFiniteError,
    StopOnNonFinite,
    SyncBatchNormPlugin,
    first_non_finite_parameter,
)
from syncbn.training.callbacks import non_finite
from tests.support.ranks import Ranks, messages
from tests.support.refuses import refuses
from tests.training.support.plain_lightning import QUIET, as_of_torchrun, free_port, quiet_trainer
from tests.training.support.train_command import train

STEPS = 8
REMEDY = "lower optimizer.lr, set trainer.gradient_clip_val or check the data; the last checkpoint before it is kept"

pytestmark = QUIET


class Lit(pl.LightningModule):
    """Logs, measures and counts, as a training step does."""

    def __init__(self, *layers: nn.Module, lr: float = 0.01) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), *layers, nn.Linear(6, 1))
        self.mean, self.lr, self.steps = MeanMetric(nan_strategy="error"), lr, 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.steps += 1
        if loss.isfinite():
            self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True)
        return loss

    def loss(self, batch: Tensor) -> Tensor:
        return self.body(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


class Overflow(nn.Module):
    """Gives an inf from call ``at`` on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * float("inf") if self.calls > self.at else x


def batches(size: int = 4, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(STEPS, size, 4, generator=torch.Generator().manual_seed(seed)))


def loader(data: Any) -> Any:
    return DataLoader(data, batch_size=None, shuffle=False)


class Before(pl.Callback):
    """State, as it is after the last good batch and just before the look at the loss."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.steps, self.measured = pl_module.steps, pl_module.mean.mean_value.clone()
        self.attributes = set(vars(pl_module))
        self.random = torch.get_rng_state()


def fit(lit: pl.LightningModule, data: list[Any], *more: pl.Callback, look: StopOnNonFinite | None = None, **trainer):
    """Trains until the error, which it returns."""
    runner = quiet_trainer(*more, look or StopOnNonFinite(), **{"max_epochs": 1, "log_every_n_steps": 1} | trainer)
    with pytest.raises(NonFiniteError) as raised:
        runner.fit(lit, loader(data))
    message = str(raised.value)
    assert message.endswith(f"; {REMEDY}")
    assert "\n" not in message
    return raised.value


def spoiled(at: int = 5, **options: int) -> list[Tensor]:
    data = batches(**options)
    data[at][0, 0] = float("nan")
    return data


def test_a_layer_that_overflows_is_named_and_everything_is_as_it_was() -> None:
    lit, before = Lit(Overflow(at=5)), Before()
    error = fit(lit, batches(), before)
    assert str(error).startswith(
        "the loss is nan at step 5 (epoch 0, batch 5) on rank 0: "
        "the first non-finite output is that of body.3 (Overflow), whose input is finite; "
    )
    assert error.guilty
    for name, value in lit.state_dict().items():
        assert torch.equal(value, before.state[name]), name
    for name, weight in lit.named_parameters():
        assert torch.equal(weight, before.weights[name]), name
    assert lit.body[1].num_batches_tracked == 6
    assert (lit.steps, lit.mean.mean_value) == (before.steps, before.measured)
    assert set(vars(lit)) == before.attributes
    assert torch.equal(torch.get_rng_state(), before.random)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in lit.modules())


def test_a_batch_that_is_not_finite_is_to_blame() -> None:
    error = fit(Lit(), spoiled())
    assert " at step 5 (epoch 0, batch 5) on rank 0: the batch itself holds non-finite numbers; " in str(error)
    assert "the first non-finite output is that of body.0 (Linear)" in str(error)
    assert error.guilty


def test_a_nan_in_the_batch_that_no_layer_sees_is_to_blame_too() -> None:
    class Targets(Lit):
        def loss(self, batch: Any) -> Tensor:
            return (self.body(batch[0]) - batch[1]).square().mean()

    data = [(x, torch.full((4, 1), float("nan") if index == 2 else 0.0)) for index, x in enumerate(batches())]
    error = fit(Targets(), data)
    assert " at step 2 (epoch 0, batch 2) on rank 0: the batch itself holds non-finite numbers; lower" in str(error)
    assert error.guilty


def test_weights_that_blew_up_are_named() -> None:
    class Lost(Lit):
        def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
            if batch_idx == 3:
                self.body[3].weight.data[0, 2] = float("inf")

    error = fit(Lost(), batches())
    assert " at step 4 (epoch 0, batch 4) on rank 0: the first non-finite output is that of body.3 (Linear), " in str(
        error
    )
    assert "whose weight is not finite already; " in str(error)


def test_a_learning_rate_that_blows_up_ends_with_the_step() -> None:
    data = batches()
    error = fit(Lit(lr=1e30), data)
    assert "at step 1 (epoch 0, batch 1)" in str(error) or "at step 2 (epoch 0, batch 2)" in str(error)
    assert "the first non-finite output is that of body." in str(error)


def test_the_loss_function_is_blamed_where_all_layers_are_finite() -> None:
    class Exponential(Lit):
        def loss(self, batch: Tensor) -> Tensor:
            return self.body(batch).abs().mean().add(100).exp()

    error = fit(Exponential(), batches())
    blamed = "every layer's output is finite, so it is the loss function; "
    assert str(error).startswith(f"the loss is inf at step 0 (epoch 0, batch 0) on rank 0: {blamed}")
    assert error.guilty


def test_a_loss_that_is_finite_the_second_time_is_told() -> None:
    class Counts(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.batches = CatMetric()

        def loss(self, batch: Tensor) -> Tensor:
            self.batches.update(1.0)
            return super().loss(batch) * (float("nan") if self.steps == 3 else 1.0)  # it counts after this

    lit = Counts()
    error = fit(lit, batches())
    assert len(lit.batches.value) == 4
    assert "at step 3 (epoch 0, batch 3) on rank 0: run again, the same step has a finite loss" in str(error)


def test_what_is_between_layers_is_told_from_a_layer() -> None:
    class Between(Lit):
        def loss(self, batch: Tensor) -> Tensor:
            return self.body[3](self.body[0](batch) / 0).mean()

    error = fit(Between(), batches())
    assert "body.3 (Linear), whose input is not finite though every layer's output before it is" in str(error)


def test_accumulated_batches_count_as_lightning_counts() -> None:
    lit, before = Lit(), Before()
    error = fit(lit, spoiled(at=5), before, accumulate_grad_batches=2)
    assert "at step 2 (epoch 0, batch 5)" in str(error)
    for name, weight in lit.named_parameters():
        assert torch.equal(weight, before.weights[name]), name


def test_training_that_stops_leaves_the_statistics_as_they_were_before_the_first_of_accumulated_batches() -> None:
    class Note(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                self.statistics = [each.clone() for each in pl_module.body[1].buffers()]

    lit, note = Lit(), Note()
    look = StopOnNonFinite(action="stop")
    quiet_trainer(note, look, max_epochs=1, accumulate_grad_batches=2).fit(lit, loader(spoiled(at=5)))
    assert look.diverged
    assert all(map(torch.equal, lit.body[1].buffers(), note.statistics))


class OverflowInHalf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("inf") if x.dtype == torch.bfloat16 else x


def test_half_precision_is_that_of_the_step() -> None:
    error = fit(Lit(OverflowInHalf()), batches(), precision="bf16-mixed")
    assert "at step 0 (epoch 0, batch 0) on rank 0: the first non-finite output is that of body.3 (OverflowIn" in str(
        error
    )


def test_the_second_epoch_is_named() -> None:
    error = fit(Lit(Overflow(at=STEPS + 2)), batches(), max_epochs=3)
    assert f"at step {STEPS + 2} (epoch 1, batch 2)" in str(error)


def test_every_n_steps_says_when_it_was_finite() -> None:
    error = fit(Lit(Overflow(at=4)), batches(), look=StopOnNonFinite(every_n_steps=3))
    assert "the loss is nan at step 6 (epoch 0, batch 6) on rank 0, and was finite at step 3: " in str(error)
    assert "(Linear), whose weight is not finite already" in str(error)


@pytest.mark.parametrize("value", [0, -1])
def test_every_n_steps_below_one_is_refused(value: int) -> None:
    with refuses("callbacks.finite.every_n_steps", value, "use 1 or more, or null"):
        StopOnNonFinite(every_n_steps=value)


def test_a_step_that_cannot_be_run_again_is_still_named() -> None:
    class Once(Lit):
        def loss(self, batch: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise KeyError("only once")
            return super().loss(batch) * float("nan")

    error = fit(Once(), batches())
    assert "on rank 0: the layer is not known, since the step could not be run again (KeyError: 'only once'); " in str(
        error
    )
    assert not error.guilty


class Manual(Lit):
    def __init__(self, *layers: nn.Module, factor: float = 1.0) -> None:
        super().__init__(*layers)
        self.automatic_optimization, self.factor = False, factor

    def training_step(self, batch: Tensor) -> None:  # type: ignore[override]  # without batch_idx
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch) * self.factor)
        optimizer.step()


def test_manual_optimization_is_looked_at_up_to_its_first_backward() -> None:
    lit, before = Manual(Overflow(at=4)), Before()
    error = fit(lit, batches(), before)
    assert "at step 4 (epoch 0, batch 4) on rank 0: the first non-finite output is that of body.3 (Overflow)" in str(
        error
    )
    for name, weight in lit.named_parameters():
        assert torch.equal(weight, before.weights[name]), name

    lit = Manual(factor=float("nan"))
    error = fit(lit, batches(), before)
    assert " on rank 0: every layer's output is finite, so it is the loss function; " in str(error)
    for name, weight in lit.named_parameters():
        assert torch.equal(weight, before.weights[name]), name


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_running_statistics_are_to_blame_where_a_layer_normalizes_with_them() -> None:
    lit = Lit()
    lit.body[0] = nn.BatchNorm1d(4)
    lit.body[1] = nn.Linear(4, 6)
    error = fit(lit, spoiled(at=1))  # which spoils them, but after the fact
    assert not lit.body[0].running_mean.isfinite().all()
    blamed = "the batch itself holds non-finite numbers; the first non-finite output is that of body.0 (BatchNorm1d); "
    assert blamed in str(error)
    lit.body[0].eval()
    error = fit(lit, batches())
    assert "that of body.0 (BatchNorm1d), whose running_mean is not finite already; " in str(error)


def look_at_torchs_own(rank: int, world_size: int) -> tuple[Any, ...]:
    if rank == 1:  # does not answer
        return ()
    lit = Lit(Overflow(at=0))
    lit.body[1] = nn.SyncBatchNorm(6)
    seen = non_finite.replay(quiet_trainer(), lit, batches()[0], 0)
    return seen.error, seen.layer and seen.layer[0], type(lit.body[1]) is nn.SyncBatchNorm, lit.body[1].process_group


def test_torchs_own_synchronized_layer_can_be_looked_at(ranks: Ranks) -> None:
    looked, _ = ranks.run(look_at_torchs_own, world_size=2, fresh=True)  # no group is made yet
    assert looked == (None, "body.3", True, None)


def test_first_non_finite_parameter() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    net.register_buffer("mask", torch.tensor([float("-inf")]))
    assert first_non_finite_parameter(net) is None
    net[1].running_var[1] = float("nan")
    assert first_non_finite_parameter(net) == "1.running_var"
    net[2].weight.data[0, 0] = float("inf")
    assert first_non_finite_parameter(net) == "2.weight"
    assert first_non_finite_parameter(nn.ReLU()) is None


def of_two(rank: int, world_size: int, port: int, size: int, group: Any, own_message: bool) -> tuple[Any, ...]:
    """Rank 1 gets a nan at step 3; on each rank: message, guilt, messages in the look, whether state is as it was."""
    sent: list[tuple[int, int]] = []  # operations, payloads

    class Sends(Lit):
        def loss(self, batch: Tensor) -> Tensor:
            if own_message:
                dist.all_reduce(torch.zeros(1))
            return super().loss(batch)

    def counted(*arguments: Any) -> Any:
        with messages() as seen:
            result = replay(*arguments)
        sent.append((len(seen.operations), len(seen.payloads)))
        return result

    replay = non_finite.replay
    lit, before = Sends(), Before()
    plugins = [] if group is None else [SyncBatchNormPlugin(**group)]
    data = spoiled(at=3, size=size) if rank == 1 else batches(size)
    options = {"devices": 2, "strategy": DDPStrategy(), "plugins": plugins, "use_distributed_sampler": False}
    with as_of_torchrun(rank, world_size, port), pytest.MonkeyPatch.context() as patch:
        patch.setattr(non_finite, "replay", counted)
        error = fit(lit, data, before, **options)
    same = all(torch.equal(v.nan_to_num(), before.state[k].nan_to_num()) for k, v in lit.state_dict().items())
    finite_weights = all(bool(weight.isfinite().all()) for weight in lit.parameters())
    kinds = {type(layer).__name__ for layer in lit.modules()}
    return str(error), error.guilty, sent, same and finite_weights, kinds


@pytest.mark.parametrize("size", [4, 1])  # of one sample there are no statistics on one rank alone
def test_shared_statistics_stop_both_ranks_and_one_is_guilty(ranks: Ranks, size: int) -> None:
    innocent, guilty = ranks.run(of_two, free_port(), size, {}, False, world_size=2, fresh=True)
    where = "the loss is nan at step 3 (epoch 0, batch 3) on rank"
    assert innocent[0].startswith(
        f"{where} 0: with this rank's own batch it is finite: another rank's batch caused it by shared statistics; "
    )
    assert guilty[0].startswith(f"{where} 1: the batch itself holds non-finite numbers; ")
    assert (innocent[1], guilty[1]) == (False, True)
    for _, _, sent, same, kinds in (innocent, guilty):
        assert sent == [(0, 0)]
        assert same
        assert "BatchNorm1d" in kinds


def test_a_step_with_messages_of_its_own_does_not_hang(ranks: Ranks) -> None:
    innocent, guilty = ranks.run(of_two, free_port(), 4, {}, True, world_size=2, fresh=True)
    assert "the step could not be run again (RuntimeError: training_step calls a collective" in innocent[0]
    assert not innocent[1]
    assert "on rank 1: the batch itself holds non-finite numbers; " in guilty[0]
    assert guilty[1]
    assert innocent[2] == guilty[2] == [(1, 0)]  # begun, and refused


@pytest.mark.parametrize("norm", ["local", "sync"])
def test_the_command_ends_with_one_line_and_keeps_the_last_checkpoint(tmp_path: Path, norm: str) -> None:
    spoil = "+callbacks.spoil={_target_: mine.Spoil, rank: 1, step: 20}"  # 18 steps an epoch
    run = train(tmp_path, spoil, "model=mlp", "trainer.max_epochs=3", f"norm={norm}", timeout=120)
    assert run.code == 1
    line = run.err.splitlines()[-1]
    assert line.startswith("error: rank ")
    assert "failed: NonFiniteError: the loss is nan at step 20 (epoch 1, batch 2) on rank " in line
    assert REMEDY in line
    if norm == "local":  # rank 0's loss is finite
        assert run.err.count("\n") == 1
        assert "on rank 1: the batch itself holds non-finite numbers; " in line
        assert "the first non-finite output is that of network." in line
    assert run.json("run")["status"] == "failed"
    last = torch.load(run.directory / "checkpoints" / "last.ckpt", weights_only=True)  # type: ignore[operator]
    assert last["global_step"] == 18
    assert all(bool(value.isfinite().all()) for value in last["state_dict"].values())
    assert run.left == []
