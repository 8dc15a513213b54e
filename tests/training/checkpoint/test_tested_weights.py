"""A run's own test is that of the file which its result names, whatever the callbacks do to the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.support.train_command import train

QUICK = ["model=mlp", "logger=csv", "trainer.max_epochs=3", "optimizer.lr=0.02", "+trainer.limit_train_batches=9"]
EMA = ["+callbacks.average._target_=lightning.pytorch.callbacks.EMAWeightAveraging", "+callbacks.average.decay=0.8"]
SUITE = ["corruptions=suite", "corruptions.curve.batch_sizes=[16,128]"]  # seven sizes need 14 times the batches
AGAIN = ["fit=true", "precise_batches=5"]  # the test again, with other data and other statistics


def both(where: Path, *settings: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of a run, and that of a test of its checkpoint."""
    run = train(where, "run.id=a", *QUICK, *settings).ended()
    assert "WeightAveraging" not in run.out + run.err  # Lightning's warning is about what is meant here
    own = run.json("result")
    assert own["tested"] == "checkpoint"
    alone = train(where, "run.id=t", "mode=test", f"ckpt_path={own['checkpoint']}", "logger=csv", *settings).ended()
    return own, alone.json("result")


@pytest.mark.parametrize(
    "settings",
    [
        ["trainer.devices=2", *EMA, *AGAIN],
        ["simulate=2", *EMA, *AGAIN],
        ["trainer.devices=1", "+callbacks.merges._target_=averages.Merges", *AGAIN],
        ["trainer.devices=1", "+callbacks.puts_back._target_=averages.PutsBack", *SUITE, "seed=3"],
        [
            "trainer.devices=2",
            "+callbacks.average={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.1, "
            "swa_epoch_start: 1}",
            "adapt=batch",
        ],
    ],
    ids=["ema", "ema simulated", "merges", "puts back", "swa"],
)
def test_a_run_tests_the_file_that_it_names(tmp_path: Path, settings: list[str]) -> None:
    own, alone = both(tmp_path, *settings)
    names = [name for name in ("test", "fit", "precise", "corrupted", "adapted") if name in own]
    assert names == [name for name in ("test", "fit", "precise", "corrupted", "adapted") if name in alone]
    assert len(names) == 1 + 2 * ("fit=true" in settings or "corruptions=suite" in settings)
    for name in names:
        assert own[name] == pytest.approx(alone[name], rel=1e-6), name


def test_the_weights_of_an_average_are_what_its_best_checkpoint_holds(tmp_path: Path) -> None:
    run = train(tmp_path, *QUICK, "trainer.devices=1", *EMA).ended()
    saved = torch.load(run.json("result")["checkpoint"], weights_only=True)
    name = next(name for name in saved["state_dict"] if name.endswith("weight"))
    assert not torch.equal(saved["state_dict"][name], saved["current_model_state"][name])


def test_without_a_best_checkpoint_the_final_weights_are_tested(tmp_path: Path) -> None:
    """The last resume point has the same weights: of an average, the average."""
    run = train(
        tmp_path, *QUICK, "run.id=a", "callbacks.checkpoint.save_top_k=0", "trainer.devices=2", *EMA, *AGAIN
    ).ended()
    own = run.json("result")
    assert (own["checkpoint"], own["tested"]) == (None, "final weights")
    assert "the weights at the end of training: there is no best checkpoint" in run.out
    options = ["mode=test", "ckpt_path=outputs/a/checkpoints/last.ckpt", "run.id=t", "logger=csv", "trainer.devices=2"]
    alone = train(tmp_path, *options, *EMA, *AGAIN).ended()
    for name in ("test", "fit", "precise"):
        assert own[name] == pytest.approx(alone.json("result")[name], rel=1e-6), name


FREEZE = ["+callbacks.probe={_target_: mine.Probe, path: seen, freeze: network.body.1}"]


def test_population_statistics_leave_alone_what_training_left_frozen(tmp_path: Path) -> None:
    """That layers are in evaluation mode is a matter of training, so the checkpoint says it."""
    own, alone = both(tmp_path, "trainer.devices=1", "precise_batches=5", *FREEZE)
    assert own["precise"] == pytest.approx(alone["precise"], rel=1e-6)
    saved = torch.load(own["checkpoint"], weights_only=True)
    assert saved["frozen_norms"] == ["network.body.1"]
    # Other layers are measured: behind a layer that was measured too they would be given something else.
    thawed = train(
        tmp_path, "run.id=u", "mode=test", f"ckpt_path={rewritten(own['checkpoint'])}", "precise_batches=5"
    ).ended()
    assert abs(thawed.json("result")["precise"]["precise/loss"] - own["precise"]["precise/loss"]) > 1e-4


def rewritten(path: str) -> Path:
    """The checkpoint without its note of frozen layers, beside it."""
    saved = torch.load(path, weights_only=True)
    saved["frozen_norms"] = []
    torch.save(saved, Path(path).with_name("thawed.ckpt"))
    return Path(path).with_name("thawed.ckpt")
