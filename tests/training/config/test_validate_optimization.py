"""Settings of optimizer, schedule, averages, early stopping: what is refused, and how the learning rate is scaled."""

from typing import Any

import pytest

from syncbn.training.config.compare import changes_of
from syncbn.training.config.machine import Machine
from syncbn.training.config.settle import settle
from syncbn.training.launch import summary
from tests.support.refuses import refuses
from tests.training.support.settled_config import composed, settled

HERE = Machine(cores=8, gpus=0, launched=None)


@pytest.mark.parametrize(
    ("overrides", "setting", "value", "words"),
    [
        (["averaging.ema=1.5"], "averaging.ema", 1.5, "0.999"),
        (["averaging.ema=1"], "averaging.ema", 1.0, "below 1"),
        (["averaging.ema=0.9", "averaging.swa_from=3"], "averaging.ema", 0.9, "one of the two"),
        (["averaging.swa_lr=0.1"], "averaging.swa_lr", 0.1, "set averaging.swa_from"),
        (["averaging.bn_batches=10"], "averaging.bn_batches", 10, "set averaging.ema"),
        (["averaging.ema=0.9", "averaging.swa_lr=0.1"], "averaging.swa_lr", 0.1, "averaging.swa_from"),
        (["averaging.ema=0.9", "averaging.bn_batches=10", "norm=none"], "averaging.bn_batches", 10, "norm=none"),
        (
            ["averaging.swa_from=2", "averaging.bn_batches=5", "simulate=2", "trainer.accumulate_grad_batches=2"],
            "averaging.bn_batches",
            5,
            "use a multiple of 2",
        ),
        (
            ["averaging.ema=0.9", "+callbacks.precise={_target_: syncbn.training.PreciseStatistics, num_batches: 5}"],
            "callbacks.precise",
            "syncbn.training.PreciseStatistics",
            "averaging.bn_batches=20",
        ),
        (["averaging.swa_from=16"], "averaging.swa_from", 16.0, "15 epochs"),
        (["averaging.swa_from=2.5"], "averaging.swa_from", 2.5, "whole number"),
        (["averaging.swa_from=0.5", "trainer.max_epochs=-1", "scheduler=constant"], "averaging.swa_from", 0.5, "share"),
        (["averaging.every_n_steps=0"], "averaging.every_n_steps", 0, "1 or more"),
        (["early_stopping.patience=0"], "early_stopping.patience", 0, "1 or more"),
        (["early_stopping.min_delta=0.1"], "early_stopping.min_delta", 0.1, "patience"),
        (["early_stopping.patience=3", "early_stopping.mode=up"], "early_stopping.mode", "up", "max, min or null"),
        (
            ["early_stopping.patience=3", "callbacks.checkpoint.monitor=null"],
            "early_stopping.patience",
            3,
            "callbacks.checkpoint.monitor",
        ),
        (["early_stopping.patience=3", "averaging.swa_from=9"], "early_stopping.patience", 3, "averaging.swa_from"),
        (["optimizer.lr_batch=0"], "optimizer.lr_batch", 0, "1 or more"),
        (["optimizer.layer_decay=1.2"], "optimizer.layer_decay", 1.2, "at most 1"),
        (["optimizer.lr_scale={stem: -1}"], "optimizer.lr_scale", {"stem": -1}, "globs"),
        (["scheduler.warmup_epochs=2", "scheduler.warmup_steps=5"], "scheduler.warmup_steps", 5, "one of the two"),
        (["scheduler.warmup_epochs=15"], "scheduler.warmup_epochs", 15, "15 epochs"),
        (["scheduler.warmup_lr=0.5", "scheduler.warmup_epochs=1"], "scheduler.warmup_lr", 0.5, "optimizer.lr=0.05"),
        (["scheduler.interval=batch"], "scheduler.interval", "batch", "epoch or step"),
        (["scheduler=one_cycle", "scheduler.pct_start=1"], "scheduler.pct_start", 1, "below 1"),
        (["trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val", -1, "above 0"),
        (["trainer.gradient_clip_algorithm=max"], "trainer.gradient_clip_algorithm", "max", "norm"),
        (["trainer.gradient_clip_algorithm=value"], "trainer.gradient_clip_algorithm", "value", "gradient_clip_val"),
        (["mode=search"], "mode", "search", "find_lr"),
        (["mode=find_lr", "find_lr.max=1e-7"], "find_lr.max", 1e-7, "find_lr.min"),
        (["mode=find_lr", "find_lr.steps=5"], "find_lr.steps", 5, "20 or more"),
        (["mode=find_lr", "ckpt_path=a.ckpt"], "ckpt_restore", None, "ckpt_restore=weights"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], setting: str, value: Any, words: str) -> None:
    with refuses(setting, value, words):
        settled(*overrides, machine=HERE)


def test_rates_of_layers_need_a_module_that_takes_them() -> None:
    with refuses("optimizer.layer_decay", 0.5, "module.layer_decay='${optimizer.layer_decay}'"):
        settled("optimizer.layer_decay=0.5", "~module.layer_decay", machine=HERE)


def test_the_rate_is_scaled_with_the_samples_of_a_step() -> None:
    scaled = ["optimizer.lr_batch=256", "optimizer.lr=0.1", "data.batch_size=16", "trainer.devices=4"]
    plan = settled(*scaled, "trainer.accumulate_grad_batches=2", machine=HERE)
    assert plan.cfg.optimizer.lr == plan.cfg.module.optimizer.lr == pytest.approx(0.1 * 16 * 4 * 2 / 256)
    assert (plan.cfg.optimizer.lr_given, plan.cfg.optimizer.lr_batch) == (0.1, 256)
    assert "; lr 0.05 = 0.1 x 128/256 samples per step" in summary.headline(plan)
    simulated = settled(*scaled[:3], "trainer.accumulate_grad_batches=2", "simulate=4", machine=HERE)
    assert simulated.cfg.optimizer.lr == plan.cfg.optimizer.lr
    again = settle(plan.settings(), HERE, plan.run_dir)  # settings that are settled are not scaled once more
    assert again.cfg.optimizer == plan.cfg.optimizer
    fewer = settled(*scaled[:2], "data.global_batch_size=64", "trainer.devices=2", machine=HERE)
    assert fewer.cfg.optimizer.lr == pytest.approx(0.1 * 64 / 256)  # on any number of devices


def test_the_class_of_the_optimizer_gets_its_own_arguments_only() -> None:
    from hydra.utils import instantiate

    for name in ("sgd", "adam", "adamw", "rmsprop"):
        plan = settled(f"optimizer={name}", "optimizer.layer_decay=0.5", "optimizer.lr_batch=64", machine=HERE)
        import torch

        instantiate(plan.cfg.module.optimizer)([torch.nn.Parameter(torch.ones(1))])
        assert plan.cfg.module.layer_decay == 0.5


def test_a_run_of_an_earlier_version_has_the_same_settings() -> None:
    now = settled("scheduler=steps", machine=HERE)
    before = composed("scheduler=steps")
    before = settle(before, HERE, now.run_dir).settings()
    for section in ("averaging", "early_stopping", "find_lr"):
        before.pop(section)
    for name in ("lr_batch", "layer_decay", "lr_scale"):
        before.optimizer.pop(name)
    for name in ("interval", "warmup_epochs", "warmup_steps", "warmup_lr"):
        before.scheduler.pop(name)
    before.trainer.pop("gradient_clip_algorithm")
    before.module.pop("layer_decay"), before.module.pop("lr_scale")
    before.scheduler._target_ = "torch.optim.lr_scheduler.MultiStepLR"
    assert changes_of(now.cfg, before, []) == []


def test_the_arguments_of_another_scheduler_are_its_own_business() -> None:
    own = ["scheduler._target_=torch.optim.lr_scheduler.ConstantLR", "scheduler.warmup_lr=9"]
    settled(*own, "scheduler.warmup_epochs=2", "scheduler.warmup_steps=5", machine=HERE)
