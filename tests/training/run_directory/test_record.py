"""A run directory's own account of it: begun anywhere anew, told with what there is, whole on a full disk."""

import io
import itertools
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from syncbn.training.checkpoint import continue_run
from syncbn.training.config.plan import Plan
from syncbn.training.launch import summary
from syncbn.training.loggers import wandb_files
from syncbn.training.loggers.wandb_journal import Journal, Line
from syncbn.training.run_directory import record
from tests.training.support.full_disk import fill_disk_for
from tests.training.support.settled_config import settled
from tests.training.support.train_command import train

CHECKPOINT = {"loops": {"fit_loop": {"epoch_progress": {"current": {"processed": 1}}}}}
RESULT = {"seconds": 12.34, "epochs": 2, "steps": 36, "epochs_before": 1, "images_per_second": 1234.5, "test": {}}


class Killed(BaseException):
    """What a kill is to the code that it hits."""


def settings(
    ckpt_path: Path | None = None, max_epochs: int = 1, *, batch_size: int = 4, run_dir: Path = Path("somewhere")
) -> Plan:
    cfg = OmegaConf.create(
        {
            "ckpt_path": str(ckpt_path) if ckpt_path else None,
            "ckpt_restore": None,
            "trainer": {"accelerator": "cpu", "devices": 2, "num_nodes": 1, "max_epochs": max_epochs},
            "norm": {"name": "sync", "group": "world", "ghost_batch": None},
            "data": {"batch_size": batch_size, "global_batch_size": 2 * batch_size},
            "timeouts": {"stop": 1},
            "run": {"id": None},
        }
    )
    return Plan.of(cfg, run_dir)


def finished(run_dir: Path) -> Path:
    """A run directory after its first attempt, which went well."""
    record.begin(settings(run_dir=run_dir), run_dir.name, ["first"])
    (run_dir / "checkpoints").mkdir()
    torch.save(CHECKPOINT, run_dir / "checkpoints" / "last.ckpt")
    (run_dir / "metrics.csv").write_text("step\n0\n", encoding="utf-8")
    (run_dir / "ranks").mkdir()
    record.write(run_dir, "result", RESULT)
    record.write(run_dir, "wandb", {"url": None})
    record.end(run_dir, "finished")
    return run_dir


def killed_before(number: int, what: Callable[[], None]) -> bool:
    """Whether a kill before the ``number``-th change of a file ended it."""
    changes = itertools.count()

    def deadly(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            if next(changes) == number:
                raise Killed
            return change(*arguments, **options)

        return changed

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "write_text"):
            patch.setattr(Path, name, deadly(getattr(Path, name)))
        patch.setattr(OmegaConf, "save", deadly(OmegaConf.save))
        try:
            what()
        except Killed:
            return True
    return False


def go_on(run_dir: Path) -> None:
    plan = continue_run.continued(settings(max_epochs=2, run_dir=run_dir), lambda line: None)
    assert plan is not None
    assert plan.checkpoint is not None
    record.begin(plan, run_dir.name, ["more"])


def test_a_kill_while_a_run_begins_once_more_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_git", lambda: None)
    before = finished(tmp_path / "before")
    about = record.read(before, "run")
    for first in itertools.count():
        shutil.copytree(before, tmp_path / str(first))
        if not killed_before(first, lambda: go_on(tmp_path / str(first))):  # noqa: B023  # called at once
            break
        for second in itertools.count():
            run_dir = shutil.copytree(tmp_path / str(first), tmp_path / f"{first}-{second}")
            through = not killed_before(second, lambda: go_on(run_dir))  # noqa: B023
            assert (run_dir / "result.json").exists() or record.read(run_dir, "run")["status"] == "running"
            go_on(run_dir)
            now = record.read(run_dir, "run")
            assert (now["status"], now["overrides"], now["wandb_id"]) == ("running", ["more"], about["wandb_id"])
            assert OmegaConf.load(run_dir / "config.yaml").trainer.max_epochs == 2
            assert record.read(run_dir, "run-1") == about
            assert record.read(run_dir, "result-1") == RESULT
            assert OmegaConf.load(run_dir / "config-1.yaml").trainer.max_epochs == 1
            assert {p.name for p in run_dir.glob("*-1*")} == {
                *("run-1.json", "result-1.json", "wandb-1.json", "config-1.yaml", "ranks-1")
            }
            assert not (run_dir / "result.json").exists()
            assert (run_dir / "metrics.csv").read_text(encoding="utf-8") == "step\n0\n"
            assert not list(run_dir.glob(".*"))
            if through:
                break
    assert first > 8


def test_a_directory_that_an_earlier_version_left_goes_on(tmp_path: Path) -> None:
    run_dir = finished(tmp_path / "a")
    old = {name: value for name, value in record.read(run_dir, "run").items() if name != "attempt"}
    record.write(run_dir, "run", old | {"wandb_id": "a"})
    shutil.copy(run_dir / "run.json", run_dir / "run-1.json")
    go_on(run_dir)
    assert record.read(run_dir, "run").items() >= {"wandb_id": "a", "attempt": 3}.items()
    assert record.read(run_dir, "result-2") == RESULT


def test_tables_of_an_attempt_that_began_anew_are_kept_apart(tmp_path: Path) -> None:
    run_dir = finished(tmp_path / "a")
    for name in ("statistics", "gradients"):
        (run_dir / f"{name}.csv").write_text("step\n0\n", encoding="utf-8")
    record.begin(settings(run_dir=run_dir), run_dir.name, [])
    assert {each.name for each in run_dir.glob("*.csv")} == {"metrics-1.csv", "statistics-1.csv", "gradients-1.csv"}


@pytest.mark.parametrize(
    ("more", "adapts"),
    [
        (["adapt=batch"], "batches of 64, with a prior of 16"),
        (["adapt=batch", "adapt.prior=0", "+adapt.group=1"], "batches of 32, with a prior of 0"),
        (["adapt=batch", "simulate=4"], "batches of 128, with a prior of 16"),
        (["adapt=stream"], "all samples so far, with a prior of 16"),
    ],
)
def test_the_headline_says_what_is_adapted_to(more: list[str], adapts: str) -> None:
    assert summary.headline(settled(*more)).endswith(f"; in the test batch norm adapts to {adapts}")


def test_the_headline_has_one_sample_in_the_singular() -> None:
    assert "1 sample each; norm local: statistics of 1 sample" in summary.headline(
        settled("data.batch_size=1", "norm=local")
    )
    assert "2 samples each; norm local: statistics of 2 samples" in summary.headline(
        settled("data.batch_size=2", "norm=local")
    )


def test_a_wandb_run_is_of_one_run_directory_for_all_its_attempts(tmp_path: Path) -> None:
    ids = []
    for name in ("multirun/a/lr", "multirun/b/lr"):
        go_on(finished(tmp_path / name))
        ids.append(record.read(tmp_path / name, "run")["wandb_id"])
        assert ids[-1] == record.read(tmp_path / name, "run-1")["wandb_id"]
        assert re.fullmatch("lr-[0-9a-f]{6}", ids[-1])
        assert record.read(tmp_path / name, "run")["id"] == "lr"
    shutil.rmtree(tmp_path / "multirun/a/lr")
    ids.append(record.read(finished(tmp_path / "multirun/a/lr"), "run")["wandb_id"])
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("20260131-235959-3f9c", "20260131-235959-3f9c"),
        ("slurm-17", "slurm-17-......"),
        ("x[a]: b;c", "x-a---b-c-......"),
        ("n" * 200, "n" * 100 + "-......"),
    ],
)
def test_wandb_ids_are_ones_that_wandb_takes(tmp_path: Path, name: str, expected: str) -> None:
    record.begin(settings(run_dir=tmp_path / "run"), name, [])
    assert re.fullmatch(expected, record.read(tmp_path / "run", "run")["wandb_id"])


def test_a_run_from_a_checkpoint_of_another_is_a_wandb_run_of_its_own(tmp_path: Path) -> None:
    base = finished(tmp_path / "base")
    log = base / "wandb/offline-run-1" / f"run-{record.read(base, 'run')['wandb_id']}.wandb"
    log.parent.mkdir(parents=True)
    log.write_bytes(bytes(100))
    Journal(base).add(Line(log.parent.name, 0, 0, ["loss"]))
    assert wandb_files.directories(base) == [log.parent]
    ids = [record.read(base, "run")["wandb_id"]]
    for job in "01":
        run_dir = tmp_path / "sweep" / job
        record.begin(settings(base / "checkpoints/last.ckpt", run_dir=run_dir), f"sweep-{job}", [])
        about = record.read(run_dir, "run")
        ids.append(about["wandb_id"])
        assert about["goes_on_from"] == str(base)
        assert wandb_files.directories(run_dir) == []
        assert Journal(run_dir).lines() == []
        record.begin(settings(base / "checkpoints/last.ckpt", run_dir=run_dir), f"sweep-{job}", [])
        assert record.read(run_dir, "run")["wandb_id"] == ids[-1]
    assert len(set(ids)) == 3


def told(run_dir: Path) -> str:
    text = io.StringIO()
    Console(file=text, width=200, soft_wrap=True, highlight=False).print(summary.summary(run_dir))
    return re.sub(" +", " ", text.getvalue()).replace(" \n", "\n")


def test_the_table_says_what_there_is(tmp_path: Path) -> None:
    run_dir = finished(tmp_path / "a")
    assert "training 12.3 s, 2 epochs, 36 steps, the first epoch before" in told(run_dir)
    assert "speed 1,234 images/s" in told(run_dir)
    record.write(run_dir, "result", {"seconds": 1.0, "test": {"test/acc": 0.5}})
    assert "test accuracy 50.00 %\n" in told(run_dir)
    assert "training 1.0 s\n" in told(run_dir)
    record.write(run_dir, "result", {"test": {"test/acc": 0.5, "test/count": 10.0}})
    assert "test accuracy 50.00 % of 10 samples\n" in told(run_dir)
    leak = {"leak/together": 0.71, "leak/spread": 0.03, "leak/difference": 0.68}
    record.write(run_dir, "result", {"test": {"test/acc": 0.5}, "leak": leak})
    assert "leak 0.6800 of pretext accuracy: 0.7100 together, 0.0300 spread\n" in told(run_dir)
    (run_dir / "result.json").unlink()
    assert "result none: a rank ended by sys.exit before the end\n" in told(run_dir)
    assert f"run directory {run_dir}\n" in told(run_dir)


def test_names_with_brackets_and_spaces_run_and_are_printed_as_a_shell_takes_them(tmp_path: Path) -> None:
    run = train(tmp_path, "hydra.run.dir='outputs/x[a] b'", "model=mlp", "trainer.max_epochs=1", "test=false").ended()
    assert run.directory == tmp_path / "outputs/x[a] b"
    assert "outputs/x[a] b/checkpoints/best.ckpt" in run.out
    command = shlex.split(run.out.splitlines()[-1].removeprefix("upload it:"))
    assert len(command) == 3
    assert tmp_path / command[2] == wandb_files.directories(run.directory)[0]


def test_a_write_that_finds_no_room_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = finished(tmp_path / "a")
    before = (run_dir / "run.json").read_bytes()
    fill_disk_for(".run.json", monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        record.end(run_dir, "failed")
    assert not list(run_dir.glob(".*"))
    assert (run_dir / "run.json").read_bytes() == before
    fill_disk_for(".config.yaml", monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        go_on(run_dir)
    assert not list(run_dir.glob(".*"))
