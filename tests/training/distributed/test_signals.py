"""``callbacks.finite.action=stop``: the step that diverges is not taken, and the run ends well."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from syncbn.nn.simulation import simulate
from syncbn.training import StopOnNonFinite
from syncbn.training.loggers.csv_logger import read
from tests.support.refuses import refuses
from tests.training.callbacks.test_non_finite import Lit, batches, loader, spoiled
from tests.training.support.plain_lightning import QUIET, quiet_trainer
from tests.training.support.train_command import train

pytestmark = QUIET
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


class Moves(Lit):
    """Every step moves all: weights, momentum, decay."""

    def __init__(self, optimizer: str, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


class AtBegin(pl.Callback):
    """The last batch that began, and what there was as its step began, with the first that is accumulated."""

    step = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch_idx
        if trainer.global_step != self.step:
            self.step, self.state = trainer.global_step, copy.deepcopy(state(trainer, pl_module))


def state(trainer: pl.Trainer, lit: pl.LightningModule) -> list[Any]:
    """All that a step moves: weights, running statistics, of simulated devices too, and the optimizer's state."""
    rows = [row for layer in lit.modules() for row in getattr(layer, "rows", None) or ()]
    body = {name: value for name, value in lit.state_dict().items() if name.startswith("body")}
    return [body, rows, trainer.optimizers[0].state_dict()["state"]]


def fit(lit: pl.LightningModule, data: list[Any], look: StopOnNonFinite, **options: Any) -> tuple[pl.Trainer, AtBegin]:
    seen = AtBegin()
    trainer = quiet_trainer(seen, look, **{"max_epochs": 3, "log_every_n_steps": 1} | options)
    trainer.fit(lit, loader(data))
    return trainer, seen


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{"min_epochs": 3}, {"accumulate_grad_batches": 4, "gradient_clip_val": 1.0, "min_steps": 10}]
)
def test_the_step_is_not_taken_and_training_ends(
    capsys: pytest.CaptureFixture[str], optimizer: str, options: dict[str, Any]
) -> None:
    lit, look = Moves(optimizer), StopOnNonFinite(action="stop")
    trainer, seen = fit(lit, spoiled(), look, **options)
    assert (seen.batch, lit.steps) == (5, 6)  # run again to find the layer, it does not count
    assert look.diverged
    torch.testing.assert_close(state(trainer, lit), seen.state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in lit.parameters())
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"warning: the loss is nan at step {5 // trainer.accumulate_grad_batches} (epoch 0, batch 5) on rank 0: the "
        "batch itself holds non-finite numbers; the first non-finite output is that of body.0 (Linear); training stops "
        "here (callbacks.finite.action=stop)"
    )


def test_what_simulated_devices_keep_each_by_itself_is_as_it_was() -> None:
    lit = Moves("momentum")
    simulate(lit, 2, keep="each")
    trainer, seen = fit(lit, spoiled(), StopOnNonFinite(action="stop"))
    assert seen.state[1]
    torch.testing.assert_close(state(trainer, lit), seen.state, rtol=0, atol=0)


def test_where_nothing_diverges_it_changes_nothing() -> None:
    ends = []
    for action in ("fail", "stop"):
        torch.manual_seed(0)
        lit, look = Moves("adamw"), StopOnNonFinite(action=action)
        trainer, _ = fit(lit, batches(), look)
        assert not look.diverged
        ends.append(state(trainer, lit))
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_another_action_is_refused() -> None:
    with refuses("callbacks.finite.action", "warn", "use fail, or stop to end "):
        StopOnNonFinite(action="warn")


SMALL = ["model=mlp", "logger=csv", "scheduler=constant", "callbacks.checkpoint.monitor=null", "data.batch_size=16"]
STOP = [*SMALL, "callbacks.finite.action=stop"]


@pytest.mark.parametrize("norm", ["local", "sync"])
def test_the_run_is_finished_and_tests_what_was_before_on_all_ranks(tmp_path: Path, norm: str) -> None:
    settings = [f"norm={norm}", "trainer.devices=2", "+trainer.limit_train_batches=6"]
    well = train(tmp_path, *SMALL, *settings, "trainer.max_epochs=1")
    spoil = "+callbacks.spoil={_target_: mine.Spoil, rank: 1, step: 6}"
    run = train(tmp_path, *STOP, *settings, spoil, "trainer.max_epochs=3", "run.id=a")
    assert run.code == 0, run.err
    (line,) = run.err.splitlines()
    assert line.startswith("warning: the loss is nan at step 6 (epoch 1, batch 0) on rank 1: the batch itself holds ")
    result = run.json("result")
    assert (result["diverged"], result["steps"]) == (1, 7)
    assert result["test"] == well.json("result")["test"]
    assert "diverged" not in well.json("result")
    assert run.json("run")["status"] == "finished"
    assert run.directory is not None
    assert [path.name for path in sorted((run.directory / "checkpoints").glob("step-*"))] == ["step-00000006.ckpt"]
    if norm == "local":  # it resumes from before the batch that was not learned
        more = train(tmp_path, *STOP, *settings, spoil, "trainer.max_epochs=4", "run.id=a")
        assert "resumes from outputs/a/checkpoints/step-00000006.ckpt" in more.out
        assert more.json("result")["test"] == result["test"]


@pytest.mark.parametrize(
    ("resume", "steps", "kept"), [("8", 8, []), ("2", 7, ["step-00000002.ckpt", "step-00000004.ckpt"])]
)
def test_weights_that_are_found_spoiled_when_they_are_saved_end_it_too(
    tmp_path: Path, resume: str, steps: int, kept: list[str]
) -> None:
    unseen = [
        "callbacks.finite.every_n_steps=100",
        "+callbacks.spoil={_target_: mine.Spoil, rank: 0, step: 4, inputs: false}",
    ]
    options = ["+trainer.limit_train_batches=8", "trainer.max_epochs=3", f"resume.every_n_steps={resume}", "simulate=2"]
    run = train(tmp_path, *STOP, *unseen, *options, "fit=true", "target=0.9")
    assert run.code == 0, run.err
    (line,) = run.err.splitlines()
    assert line.startswith("warning: network.body.0.weight is not finite after step ")
    result = run.json("result")
    assert (result["diverged"], result["steps"]) == (1, steps)
    assert result["target"]["target/reached"] == 0
    assert result["test"]["test/loss"] != result["test"]["test/loss"]  # nan
    assert result["fit"]["fit/gap"] != result["fit"]["fit/gap"]
    assert "nan" in run.out
    assert run.directory is not None
    assert [path.name for path in sorted((run.directory / "checkpoints").glob("step-*"))] == kept
    assert read(run.directory / "metrics.csv")[-1]["fit/loss"] == "nan"
