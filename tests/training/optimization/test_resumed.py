"""Killed in the middle of an epoch and resumed is bitwise the same as not interrupted, with averages and schedules."""

from pathlib import Path

import pytest
import torch

from tests.training.support.faulty_runs import differences, fault, faulty
from tests.training.support.train_command import Run

SAME = ("data.global_batch_size=64", "resume.every_n_steps=5", "trainer.log_every_n_steps=1")
CASES = {
    "ema": (
        *("averaging.ema=0.9", "averaging.every_n_steps=2", "averaging.warmup=true", "trainer.devices=2"),
        *("scheduler.warmup_epochs=1.5", "scheduler.interval=step", "norm=local_mean", "optimizer.layer_decay=0.8"),
        *("early_stopping.patience=2", "early_stopping.min_delta=0.9", "trainer.gradient_clip_val=1"),
    ),
    "swa": (
        *("averaging.swa_from=0.4", "averaging.swa_lr=0.01", "averaging.bn_batches=5", "simulate=2"),
        "trainer.check_val_every_n_epoch=2",  # the statistics of the last epoch are measured without a validation
        *("scheduler=one_cycle", "norm=local", "trainer.gradient_clip_val=0.1"),
        *("trainer.gradient_clip_algorithm=value", "model=mlp", "module=classifier"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed_is_bitwise_the_same(tmp_path: Path, name: str) -> None:
    settings = (*SAME, *CASES[name])
    straight = faulty(tmp_path, *settings, "run.id=straight").ended()
    killed = fault(tmp_path, "kill_everything", epoch=1, batch=13)
    first = faulty(tmp_path, *settings, "run.id=resumed", killed)
    assert first.code == -9
    assert (
        torch.load(first.directory / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 28
    )  # of 18 an epoch
    second = faulty(tmp_path, *settings, "run.id=resumed", killed).ended()
    assert "it resumes from" in second.out
    assert differences(straight, second) == []
    _is_in_use(second, name)


def _is_in_use(run: Run, name: str) -> None:
    last = torch.load(run.directory / "checkpoints/last.ckpt", weights_only=True)  # type: ignore[operator]
    raw, average = last["current_model_state"], last["state_dict"]
    assert not all(torch.equal(raw[key], average[key]) for key in raw)
    assert last["averaging_state"]["updates"] == {"ema": 54 // 2, "swa": 2}[name]
    if name == "ema":
        stopping = next(state for key, state in last["callbacks"].items() if key.startswith("EarlyStop"))
        assert stopping["wait_count"] == 2
        result = run.json("result")
        assert result["stopped_early"]["epoch"] == 3
        assert "did not improve by more than 0.9 in 2 validations" in result["stopped_early"]["reason"]
        assert "training stops early, after epoch 3: val/acc did not improve by more than 0.9" in run.out
