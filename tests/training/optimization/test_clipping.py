"""Gradients are clipped after the sum over ranks and accumulated batches: two ranks follow one process."""

from pathlib import Path

import torch

from tests.training.support.train_command import train

SAME = ["model=mlp", "logger=csv", "data.global_batch_size=64", "trainer.precision=64-true", "trainer.max_epochs=2"]
SAME += ["++trainer.limit_train_batches=5", "trainer.accumulate_grad_batches=2", "test=false"]
SAME += ["averaging.ema=0.8", "scheduler.warmup_steps=3", "optimizer.lr_batch=256", "optimizer.lr=0.4"]
SAME += ["module.label_smoothing=0.1"]


def test_two_ranks_follow_one_process_clipped_by_norm_and_by_value(tmp_path: Path) -> None:
    ends = {}
    for algorithm, limit in (("norm", 0.3), ("value", 0.01)):
        for devices in (1, 2):
            clip = [f"trainer.gradient_clip_algorithm={algorithm}", f"trainer.gradient_clip_val={limit}"]
            run = train(tmp_path, *SAME, *clip, f"trainer.devices={devices}", f"run.id={algorithm}{devices}").ended()
            last = run.directory / "checkpoints/last.ckpt"  # type: ignore[operator]
            ends[algorithm, devices] = torch.load(last, weights_only=True)
        one, two = ends[algorithm, 1], ends[algorithm, 2]
        assert one["global_step"] == 6  # the last step of an epoch has one batch
        for key in ("state_dict", "current_model_state"):
            for name, value in one[key].items():
                torch.testing.assert_close(two[key][name], value, rtol=0, atol=1e-10)
    name = "network.body.0.weight"
    by_norm, by_value = (ends[algorithm, 1]["state_dict"][name] for algorithm in ("norm", "value"))
    assert (by_norm - by_value).abs().max() > 1e-4
