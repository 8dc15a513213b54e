"""What curves.png shows: which columns share a panel, on which axes, and that every kind of run has a picture."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from syncbn.training.plots import curves
from syncbn.training.plots.panels import LEARNING_RATE, epochs_of, panels
from syncbn.training.run_directory import record
from tests.training.support.train_command import train

Row = dict[str, Any]


def run_of(epochs: int, loss: Any = lambda step: 10 ** (-step / 10)) -> list[Row]:
    """Rows as a run with ten steps an epoch logs them."""
    rows: list[Row] = []
    for epoch in range(epochs):
        last = 10 * epoch + 9
        rows += [{"lr-SGD/pg1": 0.1 / (epoch + 1), "lr-SGD/pg2": 0.1 / (epoch + 1), "step": last - 5}]
        rows += [{"epoch": epoch, "train/loss_step": loss(last - 5), "step": last - 5}]
        rows += [{"epoch": epoch, "val/loss": loss(last) + 0.01, "val/acc": 0.5 + 0.05 * epoch, "step": last}]
        rows += [{"epoch": epoch, "train/loss": loss(last), "train/acc": 0.6 + 0.05 * epoch, "step": last}]
    return [*rows, {"epoch": epochs, "test/loss": 0.1, "test/acc": 0.7, "test/count": 360, "step": 10 * epochs}]


def table(rows: list[Row]) -> list[dict[str, str]]:
    columns = sorted({name for row in rows for name in row})
    return [{name: str(row.get(name, "")) for name in columns} for row in rows]


def write(directory: Path, rows: list[Row]) -> None:
    found = table(rows)
    with (directory / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


def drawn(directory: Path) -> tuple[int, int]:
    curves.write_curves(directory)
    with Image.open(directory / "curves.png") as picture:
        return picture.size


def test_the_stages_of_a_metric_share_a_panel_and_losses_come_first() -> None:
    found = panels(table(run_of(4)))
    assert [panel.name for panel in found] == ["loss", "acc", LEARNING_RATE]
    labels = [(each.label, each.per_step) for each in found[0].series]
    assert sorted(labels) == [("test", False), ("train", False), ("train", True), ("val", False)]
    assert len(found[2].series) == 1  # both groups have the same learning rate
    assert [panel.is_log for panel in found] == [True, False, False]


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (["train_loss", "val_loss", "valid_acc"], ["loss", "acc"]),
        (["Training/PSNR dB", "Validation/PSNR dB"], ["PSNR dB"]),
        (["g_loss", "d_loss_step"], ["g_loss", "d_loss"]),
        (["$x^2$", "val/%", "val/ü/λ"], ["$x^2$", "%", "ü/λ"]),
        (["statistics/a/spread", "precise/acc", "fit/gap", "test/only", "corrupted/acc"], []),
    ],
)
def test_names_of_any_module(columns: list[str], names: list[str]) -> None:
    rows = [{"step": step, "epoch": 0} | dict.fromkeys(columns, step + 1) for step in (4, 9)]
    assert {panel.name for panel in panels(table(rows))} == set(names)


def test_a_loss_that_was_not_finite_is_marked_with_its_first_step() -> None:
    rows = run_of(3, lambda step: float("nan") if step > 15 else 1.0)
    (loss, *_) = panels(table(rows))
    broken = {each.column: each.broken_at for each in loss.series}
    assert broken == {"test/loss": None, "train/loss": 19, "train/loss_step": 24, "val/loss": 19}
    assert all(math.isfinite(value) for each in loss.series for value in each.values)


def test_steps_become_epochs_also_where_their_length_changes() -> None:
    rows = [{"step": step, "epoch": epoch, "val/acc": 0.5} for epoch, step in enumerate((9, 19, 24))]
    axis = curves._Axis(table([*rows, {"step": 25, "epoch": 3, "test/acc": 0.5}]))
    assert axis.name == "epoch"
    assert axis.places([4, 9, 19, 24, 29]).tolist() == pytest.approx([0.5, 1, 2, 3, 4])
    assert epochs_of(table(rows[:1])) == ([], [])
    assert curves._Axis(table(rows[:1])).name == "step"
    assert epochs_of(table([{"step": 9, "epoch": 1, "loss": 1}, {"step": 4, "epoch": 2, "loss": 1}])) == ([], [])


def test_every_kind_of_run_has_a_picture(tmp_path: Path) -> None:
    odd = [
        {"step": n, "epoch": n // 5, "my $metric$ \x1b[31m\n" + "x" * 90: n, "λ/%": -n, "text": "a"} for n in range(9)
    ]
    many = [{"step": n, "epoch": n} | {f"val/m{k}": n * k for k in range(40)} for n in range(3)]
    kinds = {"long": run_of(60), "one": run_of(1), "odd": odd, "many": many}
    kinds["diverged"] = run_of(3, lambda step: float("inf") if step > 5 else 1e30)
    kinds["step"] = [{"step": 0, "epoch": 0, "train/loss_step": 2.0}]
    sizes = {}
    for name, rows in kinds.items():
        directory = tmp_path / name
        directory.mkdir()
        write(directory, rows)
        sizes[name] = drawn(directory)
    assert sizes["many"][1] > sizes["long"][1]  # twelve panels
    assert not list(tmp_path.rglob(".*"))  # no drafts


def test_nothing_to_show_is_no_picture_and_a_problem_is_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    curves.write_curves(tmp_path)
    write(tmp_path, [{"step": 1, "epoch": 0, "test/acc": 1.0}])
    curves.write_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    write(tmp_path, run_of(2))
    (tmp_path / "curves.png").mkdir()
    curves.write_curves(tmp_path)
    error = capfd.readouterr().err
    assert error.startswith("warning: curves.png was not written (IsADirectoryError")
    assert error.count("\n") == 1


def test_the_best_checkpoint_is_that_of_the_monitor(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    rows = table([{"step": n, "epoch": n, "val/acc": value} for n, value in enumerate((0.1, 0.8, float("nan"), 0.8))])
    settings = OmegaConf.create({"callbacks": {"checkpoint": {"monitor": "val/acc", "mode": "max"}}})
    assert curves._best(rows, settings) == 1  # the first of equal ones is kept
    settings.callbacks.checkpoint.mode = "min"
    assert curves._best(rows, settings) == 0
    settings.callbacks.checkpoint.monitor = "val/none"
    assert curves._best(rows, settings) is None
    assert curves._best(rows, OmegaConf.create()) is None


def test_a_run_that_is_killed_has_its_curves_and_one_that_wants_none_has_none(tmp_path: Path) -> None:
    fault = f"+callbacks.stop={{_target_: faults.Fault, what: kill, once: {tmp_path / 'once'}, epoch: 1, batch: 3}}"
    same = ("logger=csv", "model=mlp", "run.id=a", "plots=true", "trainer.max_epochs=3")
    run = train(tmp_path, *same, fault)
    assert run.code == 1
    assert run.directory is not None
    assert record.read(run.directory, "run")["status"] == "failed"
    first = (run.directory / "curves.png").read_bytes()
    run = train(tmp_path, *same).ended()
    assert (run.directory / "curves.png").read_bytes() != first  # type: ignore[operator]
    assert not list(run.directory.glob(".*.png"))  # type: ignore[union-attr]
    none = train(tmp_path, "logger=csv", "model=mlp", "debug=fast", "run.id=b", "plots=false").ended()
    assert not list(none.directory.glob("*.png"))  # type: ignore[union-attr]
