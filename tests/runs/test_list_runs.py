"""``syncbn runs``: what it lists of run directories of any kind, in which state they may be."""

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from syncbn.runs import list_runs as listing
from syncbn.runs.config_blocks import ConfigBlocks, flattened
from syncbn.runs.differences import differing
from syncbn.runs.find import find
from syncbn.runs.list_runs import Options, all_runs
from syncbn.runs.names import REPEATED
from syncbn.training.config.compare import COPIES
from syncbn.training.run_directory import lock
from tests.study.support import run_directories
from tests.support.refuses import refuses
from tests.test_cli import syncbn
from tests.test_import import HEAVY, modules_after

Lines = Callable[..., list[str]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """What ``syncbn runs DIR`` with these options prints into a pipe."""

    def printed(directory: Path, **options: Any) -> list[str]:
        listing.list_runs([directory], Options(**options))
        return capsys.readouterr().out.splitlines()

    return printed


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Three runs, two of them jobs of a sweep."""
    run_directories.run(tmp_path / "a", norm="sync", error=3.0, settings={"optimizer.lr": 0.1})
    run_directories.run(tmp_path / "sweep" / "9", norm="local", error=5.0, seed=1)
    run_directories.run(tmp_path / "sweep" / "10", norm="local", error=4.0, status="failed")
    (tmp_path / "sweep/10/result.json").unlink()
    (tmp_path / "sweep/10/error.txt").write_text(
        "rank 0\nTraceback\nRuntimeError: [../gloo/transport] Connection closed by peer\n"
        "rank 1\nTraceback\nmy.module.OddError: the cause\n",
        encoding="utf-8",
    )
    return tmp_path


def rows(lines: list[str]) -> list[dict[str, str]]:
    """The lines of the table by column, which two spaces separate."""
    head, *rest = [re.split(r" {2,}", line.strip()) for line in lines[: lines.index("")]]
    return [dict(zip(head, each, strict=False)) for each in rest]


def test_only_settings_that_differ_are_columns(outputs: Path, lines: Lines) -> None:
    printed = lines(outputs)
    head = printed[0].split()
    assert head == ["run", "status", "started", "norm", "optimizer.lr", "seed", "test/acc", "images/s", "error"]
    assert [row["run"] for row in rows(printed)] == [f"{outputs}/{name}" for name in ("a", "sweep/9", "sweep/10")]
    assert [row["norm"] for row in rows(printed)] == ["sync", "local", "local"]
    assert rows(printed)[0]["test/acc"] == "0.97"
    assert printed[3].endswith("OddError: the cause")
    assert printed[-1] == "3 runs: 2 finished, 1 failed"


def test_groups_that_are_null_or_lack_settings(tmp_path: Path) -> None:
    run_directories.run(tmp_path / "a", settings={"augment": None, "model._target_": "syncbn.training.ResNet"})
    augment = {"augment.name": "standard", "augment.hflip": 0.5}
    for name, seed in (("b", 0), ("c", 1)):
        run_directories.run(tmp_path / name, seed=seed, settings=augment)
    # depth and width are the MLP's, and hflip that of the only augmentation: neither has two values.
    assert differing(all_runs([tmp_path])) == ["model._target_", "augment.name", "seed"]


def test_what_comes_with_the_choice_of_a_group_is_left_out(tmp_path: Path, lines: Lines) -> None:
    folder = {"data._target_": "syncbn.training.ImageFolder", "data.remainder": "pad", "data.batch_size": 4}
    for name, more in (("a", {}), ("b", folder), ("c", folder | {"optimizer.lr": 0.2}), ("d", {"data.shuffle": False})):
        run_directories.run(tmp_path / name, settings=more)
    assert differing(all_runs([tmp_path])) == ["data._target_", "data.batch_size", "optimizer.lr", "data.shuffle"]
    tested = run_directories.run(
        tmp_path / "t", tests="/far/outputs/b/checkpoints/best.ckpt", settings={"mode": "test"}
    )
    shown = {row["run"]: row for row in rows(lines(tmp_path, columns="tests,lr"))}[str(tested)]
    assert shown == {"run": str(tested), "tests": "b/best"}


def test_copies_of_groups_are_left_out() -> None:
    assert {*COPIES} <= {*REPEATED}


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("status=failed", ["sweep/10"]),
        ("status!=failed", ["a", "sweep/9"]),
        ("norm.name=sync", ["a"]),
        ("norm=lo*", ["sweep/9", "sweep/10"]),
        ("lr=0.10", ["a"]),
        ("model=MLP", ["a", "sweep/9", "sweep/10"]),
        ("test/acc>0.96", ["a"]),
        ("test/acc<=0.95", ["sweep/9"]),
        ("test/acc!=0.95", ["a", "sweep/10"]),
        ("started<2025-01-01", []),
        ("run=*/sweep/*", ["sweep/9", "sweep/10"]),
    ],
)
def test_filters(outputs: Path, lines: Lines, condition: str, kept: list[str]) -> None:
    found = json.loads("".join(lines(outputs, filters=[condition], form="json")))
    assert [each["run"] for each in found] == [f"{outputs}/{name}" for name in kept]


def test_sorted_by_a_metric_runs_without_it_come_last(outputs: Path, lines: Lines) -> None:
    order = [row["run"] for row in rows(lines(outputs, sort="test/loss"))]
    assert order == [f"{outputs}/{name}" for name in ("a", "sweep/9", "sweep/10")]
    assert "test/loss" in lines(outputs, sort="test/loss")[0]
    assert [row["run"] for row in rows(lines(outputs, sort="run", reverse=True))] == order[::-1]


def test_chosen_columns_and_metrics(outputs: Path, lines: Lines) -> None:
    assert lines(outputs, columns="status,lr,test/loss")[0].split() == ["run", "status", "optimizer.lr", "test/loss"]
    assert "test/count" in lines(outputs, metrics=["test/count"])[0]


def test_csv_and_json_are_exact(outputs: Path, lines: Lines) -> None:
    table = list(csv.DictReader(lines(outputs, form="csv")))
    assert [row["test/acc"] for row in table] == ["0.97", "0.95", ""]
    first, *_, last = json.loads("".join(lines(outputs, form="json")))
    assert first["settings"]["optimizer.lr"] == 0.1
    assert first["metrics"]["images_per_second"] == 400
    assert (last["status"], last["error"]) == ("failed", "OddError: the cause")


@pytest.mark.parametrize(
    ("option", "value", "near"),
    [
        ("filters", "nrom.name=sync", "norm.name"),
        ("filters", "test/ac>1", "test/acc"),
        ("sort", "test/los", "test/loss"),
        ("columns", "optimiser.lr", "optimizer.lr"),
        ("metrics", "test/axc", "test/acc"),
    ],
)
def test_a_name_that_no_run_has(outputs: Path, option: str, value: str, near: str) -> None:
    flag = {"filters": "--filter", "metrics": "--metric"}.get(option, f"--{option}")
    given = [value] if option in ("filters", "metrics") else value
    with refuses(flag, value, near):
        listing.list_runs([outputs], Options(**{option: given}))


def test_other_mistakes(outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refuses("--filter", "failed", "name=value"):
        listing.list_runs([outputs], Options(filters=["failed"]))
    with refuses("--filter", "test/acc>best", "number"):
        listing.list_runs([outputs], Options(filters=["test/acc>best"]))
    with refuses("DIR", tmp_path / "nothing", "no such directory"):
        listing.list_runs([tmp_path / "nothing"], Options())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with refuses("DIR", None, "outputs"):
        listing.list_runs([], Options())


def test_damaged_and_foreign_directories_are_rows(tmp_path: Path, lines: Lines) -> None:
    for name in "abcdefg":
        run_directories.run(tmp_path / name)
    run_directories.damage(tmp_path / "a/run.json")
    run_directories.damage(tmp_path / "b/result.json")
    (tmp_path / "c/config.yaml").write_text("a: [1, 2\nb: {", encoding="utf-8")
    (tmp_path / "d/run.json").unlink()
    for name, file in (("e", "run.json"), ("f", "error.txt"), ("f", ".lock"), ("g", "config.yaml")):
        (tmp_path / name / file).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name / file)
    about = json.loads((tmp_path / "f/run.json").read_text(encoding="utf-8")) | {"status": "running"}
    (tmp_path / "f/run.json").write_text(json.dumps(about), encoding="utf-8")
    (tmp_path / "sweep/0/.hydra").mkdir(parents=True)
    (tmp_path / "bombs").mkdir()
    (tmp_path / "bombs/run.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "bombs/config.yaml").write_text("a: &a [1]\n" + "b: &b [*a, *a]\n" * 40, encoding="utf-8")
    found = {Path(row["run"]).name: row["status"] for row in rows(lines(tmp_path))}
    damaged = dict.fromkeys(("a", "b", "d", "e", "bombs"), "damaged")
    assert found == damaged | {"c": "finished", "g": "finished", "f": "killed", "0": "failed"}


def test_names_with_control_characters_are_escaped(tmp_path: Path, lines: Lines) -> None:
    run_directories.run(tmp_path / "a\x1b[31mred\nrow", settings={"optimizer.lr": "\x1b[2J"})
    run_directories.run(tmp_path / os.fsdecode(b"b\xff"))
    for form in ("table", "csv"):
        assert "\x1b" not in "".join(lines(tmp_path, form=form))
    assert len(rows(lines(tmp_path))) == 2


def test_links_in_a_circle_and_two_names_of_one_run(tmp_path: Path) -> None:
    run_directories.run(tmp_path / "outputs/a")
    (tmp_path / "outputs/again").symlink_to(tmp_path / "outputs")
    (tmp_path / "outputs/0-latest").symlink_to("a")
    (tmp_path / "outputs/nothing").symlink_to("gone")
    (tmp_path / "elsewhere").mkdir()
    run_directories.run(tmp_path / "elsewhere/b")
    (tmp_path / "outputs/b").symlink_to(tmp_path / "elsewhere/b")
    names = [Path(each.path).name for each in find([tmp_path / "outputs"])]
    assert names == ["a", "b"]


def test_a_directory_without_permission_is_a_row(outputs: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("sweep"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    last = rows(lines(outputs))[0]
    assert (last["run"], last["status"]) == (f"{outputs}/sweep", "unreadable")


def test_the_lock_tells_running_from_killed_and_stays_free(tmp_path: Path) -> None:
    for name in ("held", "free"):
        run_directories.run(tmp_path / name, status="running", error=None)
        (tmp_path / name / ".lock").touch()
    lock.hold(tmp_path / "held")
    try:
        # The kernel's lock is of the open file: another open of the same process meets it too.
        found = {Path(run.path).name: run.status for run in all_runs([tmp_path])}
    finally:
        lock.release(tmp_path / "held")
    assert found == {"held": "running", "free": "killed"}
    lock.hold(tmp_path / "free")
    lock.release(tmp_path / "free")


TRICKY = [
    "a: 1\nb:\n  c: 'x\n\n    y'\n  d: [1, 2]\n",
    "a: |\n  b: 1\n  c: 2\nd: >-\n  text\n  more\n",
    'a: "one\n  two: three"\nb: 2\n',
    "a: &x {b: 1}\nc: *x\n",
    "a:\n- 1\n- b: 2\nc: {}\nd:\n",
    "a: 1\na: 2\n",
    "a:\n  b: 1\n  b: 2\n",
    "a.b: 1\n'a': {b: 2}\n",
    "? a\n: b\n",
    "a:\n  b: /x/1\n  c: /x y\n  d: ~\n  e: 1e3\n  f: 1.0e-3\n",
    "---\na: 1\n",
    "a:\n  some\n  text\n",
    "# comment\na: 1  # one\n\nb:\n  # two\n  c: 2\n",
    "a:\n    b:\n        c: 1\n    d: 2\n",
]


@pytest.mark.parametrize("text", TRICKY)
def test_settings_are_those_of_the_yaml_parser(text: str) -> None:
    blocks = ConfigBlocks()
    for _ in range(2):  # the second from what is known
        assert blocks.flat(text) == flattened(yaml.safe_load(text))


def test_a_real_configuration_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (run_directories.run(tmp_path / "a") / "config.yaml").read_text(encoding="utf-8")
    blocks = ConfigBlocks()
    expected = flattened(yaml.safe_load(text))
    assert blocks.flat(text) == expected
    monkeypatch.setattr(yaml, "load", None)  # nothing is parsed again, except for the changed line
    assert blocks.flat(text.replace(str(tmp_path), "/other")) == {
        name: each.replace(str(tmp_path), "/other") if isinstance(each, str) else each
        for name, each in expected.items()
    }


def test_what_runs_have_in_common_is_parsed_once(tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each further run only the lines that differ are parsed; benchmarks/list_runs.py has the seconds."""
    made = run_directories.copies(tmp_path, 100)
    first = len((made[0] / "config.yaml").read_text(encoding="utf-8"))
    parsed: list[str] = []
    load = yaml.load
    monkeypatch.setattr(yaml, "load", lambda text, loader: parsed.append(text) or load(text, loader))
    assert len(lines(tmp_path)) == 100 + 3
    assert sum(map(len, parsed)) < first + 100 * 400


def test_the_command(outputs: Path) -> None:
    done = syncbn("runs", str(outputs), "--filter", "status=failed")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "1 run: 1 failed"
    wrong = syncbn("runs", str(outputs / "no"))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert wrong.stderr.startswith("error: DIR=")


def test_it_imports_nothing_heavy() -> None:
    loaded = modules_after("import syncbn.runs.list_runs")
    assert not loaded & {*HEAVY, "torch", "numpy"} - {"rich"}
