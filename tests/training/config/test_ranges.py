"""Each setting of conf/ with a wrong type, a negative value, zero, a wrong word or null is one line."""

from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from syncbn.training.config import ranges
from syncbn.training.errors import SettingError
from tests.support.refuses import refuses
from tests.training.support.settled_config import composed, settled

# By the choices of a command line: settings, with values that cannot work. Each must be refused by this setting's name.
BAD: dict[str, dict[str, list[Any]]] = {
    "": {
        "seed": [-1, 2**32],
        "mode": ["tset"],
        "precise_batches": [-1],
        "target": [0.0, 1.5, -0.1],
        "simulate": [0, -2],
        "ckpt_restore": ["some"],
        "resume.every_n_steps": [0, -1],
        "resume.every_n_minutes": [0.0, -1.0, float("inf")],
        "resume.keep": [0],
        "logger.mode": ["loud", 1],
        "logger.log_model": ["all", True, None],
        "logger.tags": ["a"],
        "logger.pictures": ["maybe"],
        "timeouts.collective": [0.0, -1.0],
        "timeouts.stop": [0.0],
        "ddp.bucket_cap_mb": [0.0, -1.0],
        "ddp.comm_hook": ["fp8"],
        "ddp.comm_wrapper": ["fp8"],
        "ddp.powersgd_rank": [0],
        "ddp.powersgd_start": [1],
        "trainer.accelerator": ["tpu", 1, None],
        "trainer.devices": [0, -1, 1.5, "two", None, True],
        "trainer.num_nodes": [0, -1, "two", None],
        "trainer.max_epochs": [0, -2, 1.5, "ten", True],
        "trainer.precision": ["fp16", "32-mixed", "half", 8, True],
        "trainer.check_val_every_n_epoch": [0, -1, "one"],
        "trainer.log_every_n_steps": [0, -1, 1.5],
        "trainer.accumulate_grad_batches": [0, -1, 1.5],
        "trainer.gradient_clip_val": [-1.0, 0.0, "one"],
        "trainer.gradient_clip_algorithm": ["max"],
        "trainer.deterministic": ["maybe", 1],
        "trainer.enable_model_summary": ["maybe"],
        "trainer.num_sanity_val_steps": [-2, 0.5, "one"],
        "trainer.min_epochs": [0, -1],
        "trainer.max_steps": [0, -2, 1.5],
        "trainer.min_steps": [0, -1],
        "trainer.max_time": ["1h", "12:00", 3, "1:1:1:1"],
        "trainer.limit_train_batches": [0, -1, 1.5, "half", True, 0.0],
        "trainer.limit_val_batches": [-1, 1.5, "half"],
        "trainer.limit_test_batches": [-1, 1.5],
        "trainer.val_check_interval": [0, -1, 1.5, 0.0],
        "trainer.profiler": ["simple", "advanced", 3],
        "trainer.benchmark": ["maybe", 1],
        "trainer.detect_anomaly": ["maybe"],
        "trainer.inference_mode": ["maybe"],
        "trainer.enable_progress_bar": ["maybe"],
        "data.batch_size": [0, -4, 2.5, "all", True],
        "data.global_batch_size": [0, -4, 2.5],
        "data.num_workers": [-1, 1.5, "all", None, True],
        "data.val_fraction": [0.0, -0.1, 1.0, 1.5, "some", None],
        "data.test_fraction": [0.0, 1.5],
        "data.split_seed": [-1, 1.5, "one", None],
        "data.seed": [-1, "one"],
        "data.shuffle": ["maybe", 1, None],
        "data.shards": ["colour", 3],
        "data.num_shards": [0, 1, "two"],
        "data.remainder": ["keep", None],
        "data.corruption": ["fog", 1],
        "data.severity": [0, 6, 1.5],
        "data.corrupt_train": ["maybe"],
        "data.label_noise": [-0.1, 1.5],
        "data.outliers": [-0.1, 1.5],
        "data.outlier_scale": ["big", True],
        "model.in_channels": [0, -1, 1.5, "grey", None],
        "model.num_classes": [0, -1, "ten", None],
        "model.width": [0, -1, 1.5],
        "model.blocks": [[], [0], [1, -1], 3, "one", None],
        "module.label_smoothing": [-0.1, 1.5, "some", None],
        "module.decay_norm": ["maybe"],
        "optimizer.lr": [-0.1, "fast", float("nan"), float("inf"), None],
        "optimizer.momentum": [-0.1, "some"],
        "optimizer.weight_decay": [-0.1, "some"],
        "optimizer.nesterov": ["maybe"],
        "scheduler.final": [-0.1, 1.5, "some"],
        "scheduler.epochs": [0, -2, 1.5],
        "callbacks.checkpoint.mode": ["best", None],
        "callbacks.checkpoint.save_top_k": [-2, 0.5, "all"],
        "callbacks.checkpoint.monitor": [3],
        "callbacks.learning_rate.logging_interval": ["batch", 3],
        "callbacks.finite.every_n_steps": [0, -1],
        "callbacks.finite.action": ["warn", None],
        "callbacks.statistics.every_n_steps": [0, "all"],
        "norm.batch_size": [0, -1],
        "norm.ghost_batch": [0, -1],
        "norm.name": ["batch"],
    },
    "model=mlp": {
        "model.in_features": [0, -1, 1.5, None],
        "model.depth": [0, "deep"],
        "model.activation": ["gelu", None],
        "model.init": ["xavier"],
        "model.gain": ["large", None],
    },
    "optimizer=adamw": {"optimizer.betas": [[0.9], [0.9, 1.0], 0.9, [-0.1, 0.9], None]},
    "optimizer=rmsprop": {"optimizer.alpha": [-1.0, "a"], "optimizer.eps": [-1.0, "a"]},
    "scheduler=constant": {"scheduler.factor": [-1.0, 2.0], "scheduler.total_iters": [-1, 1.5]},
    "scheduler=steps": {"scheduler.milestones": [[0], [-1], 30, ["a"]], "scheduler.gamma": [0.0, -1.0]},
    "callbacks=gradients": {"callbacks.gradients.every_n_steps": [0, -1, 1.5]},
    "corruptions=suite": {
        "corruptions.kinds": [["fog"], "all"],
        "corruptions.severities": [[0], [6], 3],
        "corruptions.batch_size": [0, -1],
        "corruptions.prior": [-1, "a"],
    },
    "data=cifar10": {"data.train_images": [0, -1, 1.5, "all"], "data.test_images": [0, True]},
    "data=mnist": {"data.test_images": [0]},
    "norm=ghost": {"norm.batch_size": [0, -1, None]},
    "norm=group_norm": {"norm.num_groups": [0, None], "norm.min_channels": [0, 1.5]},
    "adapt=batch": {"adapt.prior": [-1, "a"], "adapt.streaming": ["maybe"]},
}
CASES = [(choices, setting) for choices, settings in BAD.items() for setting in settings]


@pytest.fixture(scope="module")
def settings() -> dict[str, DictConfig]:
    return {choices: composed(*choices.split()) for choices in BAD}


@pytest.mark.parametrize(("choices", "setting"), CASES)
def test_what_cannot_work_is_refused(settings: dict[str, DictConfig], choices: str, setting: str) -> None:
    for value in BAD[choices][setting]:
        cfg = settings[choices].copy()
        OmegaConf.update(cfg, setting, value)
        with pytest.raises(SettingError) as caught:
            ranges.check(cfg)
        error = caught.value
        assert error.setting.startswith(setting), str(error)  # an item of a list: model.blocks.0
        assert error.hint.startswith(("use ", "Input should")), str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("choices", BAD)
def test_conf_itself_is_accepted(settings: dict[str, DictConfig], choices: str) -> None:
    ranges.check(settings[choices])


GOOD = [
    *("trainer.limit_train_batches=2", "trainer.limit_train_batches=0.5", "+trainer.limit_train_batches=2"),
    *("trainer.limit_val_batches=0", "trainer.limit_val_batches=1.0", "trainer.val_check_interval=0.25"),
    *("trainer.val_check_interval=3", "trainer.max_steps=-1", "+trainer.max_steps=5", "trainer.max_epochs=-1"),
    *("trainer.max_time=00:12:00:00", "+trainer.max_time={minutes: 3}"),
    *("trainer.precision=bf16-mixed", "trainer.precision=64", "trainer.precision='64'", "trainer.deterministic=warn"),
    *("trainer.max_epochs=null", "+trainer.detect_anomaly=true", "+trainer.num_sanity_val_steps=2"),
    *("optimizer.lr=0", "module.label_smoothing=0.1", "callbacks.checkpoint.save_top_k=-1", "~callbacks"),
    *(
        "trainer.profiler=pytorch",
        "+scheduler.gamma=0 scheduler._target_=own.S scheduler.warmup_steps=0.1",
    ),
    *("scheduler._target_=own.S scheduler.interval=batch", "data._target_=own.Data data.num_workers=null"),
    *("data.num_workers=2", "model.blocks=[2]", "+model.foo=3", "~callbacks.checkpoint", "debug=profile"),
]


@pytest.mark.parametrize("override", GOOD)
def test_what_works_is_accepted(override: str) -> None:
    known = "+trainer.num_sanity" in override  # not null in conf/, so Hydra wants no +
    cfg = composed(override.removeprefix("+")) if known else composed(*_overrides(override))
    ranges.check(cfg)


def _overrides(line: str) -> list[str]:
    return line.split() if "._target_=" in line else [line]


def test_arguments_of_every_class_have_a_range() -> None:
    for line in ("data._target_=own.Data data.batch_size=0", "optimizer._target_=own.O optimizer.lr=-1"):
        with pytest.raises(SettingError):
            ranges.check(composed(*line.split()))
    for name in ("devices", "accelerator", "num_nodes"):
        with refuses(f"trainer.{name}", None, "it is missing"):
            ranges.check(composed(f"~trainer.{name}"))


def test_float16_wants_a_gpu_and_a_fast_dev_run_is_debug_fast() -> None:
    with refuses("trainer.precision", "16-mixed", "float16 needs a GPU; on the CPU use 32-true, bf16-mixed or 64-true"):
        settled("trainer.precision=16-mixed", "trainer.accelerator=cpu")
    with refuses("trainer.fast_dev_run", True, "use debug=fast"):
        settled("+trainer.fast_dev_run=true")


def test_null_is_lightnings_default_and_a_new_setting_does_not_change_an_old_run() -> None:
    from syncbn.training.config.compare import changes_of

    now = settled().cfg
    earlier = now.copy()
    OmegaConf.set_readonly(earlier, False)
    for name in ("max_steps", "limit_train_batches", "profiler", "detect_anomaly", "max_time", "inference_mode"):
        assert now.trainer[name] is None
        del earlier.trainer[name]
    assert changes_of(now, earlier, []) == []
