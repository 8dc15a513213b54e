"""A resume of trainings with loaders, callbacks and modules that are not ours."""

import csv
from pathlib import Path

import torch

from tests.training.support.faulty_runs import BATCHES, differences, fault, faulty
from tests.training.support.train_command import Run

ONE = ("trainer.devices=1", "data.global_batch_size=64", "run.id=a", "+callbacks.draws={_target_: loops.Draws}")


def resumed(where: Path, at: dict[str, object], *settings: str, what: str = "kill_everything") -> tuple[Run, Run]:
    """A run that nothing happened to, and one that something did."""
    ends = []
    for name in ("straight", "resumed"):
        place = where / name
        place.mkdir()
        if name == "resumed":
            first = faulty(place, *ONE, *settings, fault(place, what, **at))
            assert first.code == (-9 if what == "kill_everything" else 143), first.err
        ends.append(faulty(place, *ONE, *settings))
        assert ends[-1].code == 0, ends[-1].err
    return ends[0], ends[1]


def logged(run: Run, name: str) -> list[float]:
    with (run.directory / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_plain_loaders_and_callbacks_that_draw_go_on_from_an_epochs_end(tmp_path: Path) -> None:
    settings = ("data._target_=loops.Plain", "module._target_=loops.Lit")
    straight, other = resumed(tmp_path, {"epoch": 1, "batch": 7}, *settings)
    assert "it resumes from outputs/a/checkpoints/step-00000018.ckpt" in other.out
    assert differences(straight, other) == []


def test_callbacks_that_draw_and_data_without_a_length_go_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    for name, settings in {"ours": (), "stream": ("data._target_=loops.Streamed",)}.items():
        (tmp_path / name).mkdir()
        at = {"epoch": 1, "batch": 11}
        straight, other = resumed(tmp_path / name, at, *settings, "resume.every_n_steps=4")
        assert "it resumes from outputs/a/checkpoints/step-000000" in other.out
        assert "step-00000018.ckpt" not in other.out
        assert differences(straight, other) == []


def test_hyper_parameters_that_are_objects_are_left_out(tmp_path: Path) -> None:
    straight = faulty(tmp_path, *ONE, "module._target_=loops.Lit", "trainer.max_epochs=1").ended()
    assert straight.out.count("left out of checkpoints, not plain data: network, optimizer, scheduler\n") == 1
    checkpoint = torch.load(straight.directory / "checkpoints/best.ckpt", weights_only=True)  # type: ignore[operator]
    plain = {"decay_norm": False, "label_smoothing": 0.0, "num_classes": 10}
    plain |= dict.fromkeys(("class_weights", "layer_decay", "lr_scale"))
    assert checkpoint["hyper_parameters"] == plain


def test_what_would_not_load_is_told_of_when_it_is_first_saved(tmp_path: Path) -> None:
    run = faulty(tmp_path, *ONE, "+callbacks.object={_target_: loops.Object}").ended(1)
    assert "epoch 2/3" not in run.out
    assert " would hold more than plain data: an object of pathlib." in run.err


def test_plain_loaders_begin_their_epoch_anew(tmp_path: Path) -> None:
    settings = ("data._target_=loops.Plain", "module._target_=loops.Lit")
    _, other = resumed(tmp_path, {"epoch": 1, "batch": 7}, *settings, what="terminate")
    assert "it resumes from outputs/a/checkpoints/step-00000027.ckpt" in other.out
    assert "epoch 2 starts over, with the weights learned so far\n" in other.out
    last = torch.load(other.directory / "checkpoints/last.ckpt", weights_only=True)  # type: ignore[operator]
    assert last["global_step"] == 3 * BATCHES + 9
    assert logged(other, "train/first") == [1, 2, 3]


def test_a_metric_of_an_epochs_first_batch_does_not_get_into_the_next_epoch(tmp_path: Path) -> None:
    _, other = resumed(tmp_path, {"epoch": 1, "batch": 7}, "module._target_=loops.Lit", what="terminate")
    assert logged(other, "train/first") in ([1, 2, 3], [1, 3])


def test_a_run_that_stopped_early_stays_stopped_until_more_is_asked_for(tmp_path: Path) -> None:
    early = "_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/acc, mode: max"
    settings = (f"+callbacks.early={{{early}, min_delta: 2, patience: 1}}", "trainer.max_epochs=4")
    straight, other = resumed(tmp_path, {"hook": "on_test_batch_end"}, *settings)
    assert straight.json("result")["steps"] == 2 * BATCHES
    assert other.json("result")["steps"] == 2 * BATCHES
    assert "epoch" not in [line.split()[0] for line in other.out.splitlines() if line.strip()]
    more = faulty(tmp_path / "resumed", *ONE, *settings, "trainer.max_epochs=5")
    assert more.json("result")["steps"] == 3 * BATCHES  # an epoch without progress, and it stops again
