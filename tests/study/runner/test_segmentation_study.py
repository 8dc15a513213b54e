"""Tests ``+study=segmentation`` at its smoke budget: a side that fails as expected, and images on the page."""

import json
from pathlib import Path

import pytest

from syncbn.study.compare.compare import compare
from tests.training.support.train_command import Run, train

STUDY = ["+study=segmentation", "study.budget=smoke", "study.seeds=1", "study.directory=s", "logger=csv"]
STUDY += ["data.images=16", "data.eval_images=8"]
ERROR = "Expected more than 1 value per channel when training"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    where = tmp_path_factory.mktemp("segmentation")
    return where, train(where, *STUDY)


def test_runs_that_fail_as_expected_are_done(study: tuple[Path, Run]) -> None:
    where, run = study
    assert run.code == 0, run.err
    assert "8 of 8 runs" in run.out
    assert "failed:" not in run.err
    (line,) = [line for line in run.out.splitlines() if line.startswith("✓ ")]
    assert f"appears (1 of 1 runs failed with: {ERROR})" in line
    assert ERROR in (where / "s/devices/8/local/0/error.txt").read_text(encoding="utf-8")
    assert "torch.Size([1, 32, 1, 1])" in (where / "s/devices/8/local/0/error.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("side", ["local", "sync"])
def test_simulated_devices_do_what_processes_do(study: tuple[Path, Run], side: str) -> None:
    """Four devices with two images each; after two steps rounding has not grown yet."""
    where = study[0] / "s/devices/4" / side
    simulated, processes = (
        json.loads((where / name / "result.json").read_text(encoding="utf-8"))["test"] for name in ("0", "0-processes")
    )
    assert processes["test/loss"] == pytest.approx(simulated["test/loss"], rel=1e-4)


def test_they_are_not_repeated_and_others_are(study: tuple[Path, Run]) -> None:
    where, _ = study
    before = (where / "s/devices/8/local/0/error.txt").stat().st_mtime_ns
    again = train(where, *STUDY)
    assert again.code == 0, again.err
    assert "7 of 7 runs" in again.out
    assert (where / "s/devices/8/local/0/error.txt").stat().st_mtime_ns == before
    rule = "study.expectations.one_image.error=another"
    other = train(where, *STUDY, rule)
    assert other.code == 1
    assert "1 of 8 runs failed" in other.err
    assert "✗ with one image on each device" in train(where, *STUDY, rule, "study.report_only=true").out


def test_the_page_shows_images_and_predictions(study: tuple[Path, Run]) -> None:
    where, _ = study
    page = (where / "s/report/report.md").read_text(encoding="utf-8")
    assert "![Test images and predictions](plots/examples.png)" in page
    assert "The first 6 test images, their true masks, and predictions with sync and local, of one seed." in page
    assert (where / "s/report/plots/examples.png").read_bytes()[:4] == b"\x89PNG"
    assert "effects appear" in page or "effect appears" in page


def test_the_monitor_finds_the_pooling_branch(tmp_path: Path) -> None:
    """Of seven layers, on four devices with two images each, in real runs: its statistics are of two values."""
    for norm in ("sync", "local"):
        settings = ["experiment=segmentation", "trainer.devices=4", f"norm={norm}", "logger=csv", "plots=false"]
        short = [
            "data.images=128",
            "data.eval_images=8",
            "trainer.max_epochs=1",
            "callbacks.statistics.every_n_steps=1",
        ]
        run = train(tmp_path, *settings, *short, f"hydra.run.dir={norm}")
        assert run.code == 0, run.err
    found = compare([tmp_path / "sync", tmp_path / "local"], metric="test/miou")
    assert found.suggestion.startswith("norm=sync norm.only='[\"network.pooling.2\"]': "), found.suggestion
    assert found.suggestion.endswith("1 of 7 layers need it.")
    # Of 1,024 or more positions that share statistics, neighbours are alike: they are worth a few values.
    positions = found.layers[found.layers["device_batch"] >= 512]
    assert len(positions) == 6
    assert positions["effective_batch"].max() < 16
