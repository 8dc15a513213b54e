"""What counts as another setting between two attempts of a run."""

from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from syncbn.training.checkpoint import continue_run
from syncbn.training.config.plan import Plan
from syncbn.training.errors import SettingError
from syncbn.training.run_directory import record
from tests.training.support.settled_config import settled

NEW = ["adapt", "mode", "precise_batches", "simulate", "study", "test", "timeouts", "corruptions"]
NEW += ["data.shards", "data.num_shards", "data.corruption", "data.severity", "data.corrupt_train"]
NEW += ["data.label_noise", "data.outliers", "data.outlier_scale"]
NEW_OF_MLP = [*NEW, "model.activation", "model.init", "model.gain"]


def an_old_run(where: Path, cfg: Plan, new: list[str] = NEW) -> Path:
    """It has finished, before there were some of today's settings."""
    record.begin(replace(cfg, run_dir=where), "a", [])
    record.end(where, "finished")
    before = OmegaConf.load(where / "config.yaml")
    for name in new:
        parent, _, key = name.rpartition(".")
        del (OmegaConf.select(before, parent) if parent else before)[key]
    OmegaConf.save(before, where / "config.yaml")
    return where


def test_a_setting_that_an_earlier_version_did_not_have_was_its_default(tmp_path: Path) -> None:
    run_dir = an_old_run(tmp_path / "a", settled())
    assert not continue_run.continued(settled(run_dir=run_dir), lambda line: None)
    run_dir = an_old_run(tmp_path / "mlp", settled("model=mlp"), NEW_OF_MLP)
    assert not continue_run.continued(settled("model=mlp", run_dir=run_dir), lambda line: None)


@pytest.mark.parametrize(
    ("now", "change"),
    [
        ("precise_batches=8", "precise_batches=0 -> 8"),
        ("data.shards=labels", "data.num_shards=None -> 2, data.shards=None -> labels"),
        ("test=false", "test=True -> False"),
        ("callbacks.finite.action=stop", "callbacks.finite.action=fail -> stop"),
        ("callbacks=gradients", "callbacks.gradients._target_=None -> syncbn.training.GradientMonitor"),
    ],
)
def test_another_value_than_the_default_is_another_setting(tmp_path: Path, now: str, change: str) -> None:
    run_dir = an_old_run(tmp_path / "a", settled())
    with pytest.raises(SettingError, match=rf"run has finished with other settings \({change}\); use another id"):
        continue_run.continued(settled(now, run_dir=run_dir), lambda line: None)


def test_a_run_that_is_not_done_may_be_looked_at_more_closely(tmp_path: Path) -> None:
    said: list[str] = []
    more = ["callbacks=gradients", "callbacks.finite.action=stop"]
    run_dir = an_old_run(tmp_path / "a", settled())
    longer = settled(*more, "trainer.max_epochs=1000")
    assert continue_run.continued(replace(longer, run_dir=run_dir), said.append)
    record.end(run_dir, "failed")
    assert continue_run.continued(settled(*more, run_dir=run_dir), said.append)
    assert said == [f"this run {how} before; it had no checkpoint and starts over" for how in ("finished", "failed")]
