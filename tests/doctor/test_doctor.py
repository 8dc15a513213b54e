"""``syncbn doctor`` as a user calls it: well here, and FAILED with the row named where something is broken."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from syncbn.doctor import Row, Status, bounded, selftest, show, to_json, verdict
from syncbn.doctor.rows import failed, ok, warning
from syncbn.doctor.selftest_ranks import Place, ReportStage, on_ranks
from syncbn.nn.comm import all_reduce
from syncbn.nn.kernels import cpu
from tests.support.warm_process import WarmProcess
from tests.training.support.train_command import REPO, _session, environment
from tests.training.support.train_command import run as run_command

CPU = Place("cpu", "gloo", 2)
MEDIUM = "shared memory" if cpu.built() and sys.platform == "linux" else "gloo: "
LAYERS = ["layer on CPU, float32", "layer on CPU, float32, an empty rank", "layer on CPU, float64"]


class Doctor:
    """A call of the command, in a session of its own, so that whatever it leaves behind is found."""

    def __init__(
        self, where: Path, *arguments: str, popen: type[subprocess.Popen] = subprocess.Popen, **env: str
    ) -> None:
        dropped = ("SLURM_", "WANDB_", "LOCAL_", "TORCHELASTIC_", "SYNCBN_", "COLUMNS", "FORCE_COLOR")
        clean = {k: v for k, v in environment().items() if not k.startswith(dropped)}
        self.process = popen(
            [sys.executable, "-m", "syncbn.cli", "doctor", *arguments], cwd=where, env=clean | env, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            encoding="utf-8",
        )  # fmt: skip

    def end(self) -> None:
        try:
            self.out, self.err = self.process.communicate(timeout=150)
            deadline = time.monotonic() + 15
            while (left := _session(self.process.pid)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not left
        finally:
            for pid in _session(self.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    @property
    def code(self) -> int:
        return self.process.returncode

    def failures(self) -> dict[str, Any]:
        """The failed rows by the check's name, of ``--json``."""
        found = json.loads(self.out)
        assert found["ok"] is (self.code == 0)
        assert found["verdict"] in (verdict([Row(**row) for row in found["rows"]]), "all well")
        return {row["check"]: row for row in found["rows"] if row["status"] == "FAILED"}


def call(where: Path, *arguments: str, **options: Any) -> Doctor:
    doctor = Doctor(where, *arguments, **options)
    doctor.end()
    return doctor


def test_this_machine_is_well(tmp_path: Path) -> None:
    doctor = call(tmp_path)
    assert doctor.code == 0, doctor.out + doctor.err
    assert doctor.err == ""
    *table, last = doctor.out.splitlines()
    assert last.startswith("all well")
    assert all(len(line) <= 80 for line in table)
    assert "\x1b" not in doctor.out
    assert "…" not in doctor.out
    for check in ("Python", "packages", "imports", "GPUs", "backend", "disk", "launcher", "Slurm", "W&B", *LAYERS[:1]):
        assert re.search(rf"^ +{check} +(ok|warning) ", doctor.out, re.MULTILINE), check
    assert not list(tmp_path.iterdir())


def test_json_has_the_figures(tmp_path: Path) -> None:
    doctor = call(tmp_path, "--json", popen=WarmProcess)
    assert doctor.failures() == {}
    rows = {row["check"]: row for row in json.loads(doctor.out)["rows"]}
    for name in LAYERS:
        errors = rows[name]["figures"]
        tolerance = errors.pop("tolerance")
        assert tolerance == (1e-11 if "64" in name else 1e-5)
        assert errors.pop("num_batches_tracked") == 0
        assert {*errors} == {"y", "dx", "dweight", "dbias", "running_mean", "running_var"}
        assert all(0 < error < tolerance for error in errors.values())
    assert rows["all-reduce on CPU"]["found"].startswith(f"2 ranks, {MEDIUM}")
    message = rows["all-reduce on CPU"]["figures"]
    assert 1 < message["lower_quartile_us"] <= message["median_us"] <= message["upper_quartile_us"]


def test_what_is_broken_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    doctor = call(tmp_path, "--json", "--timeout=0.2", "--outputs=file/outputs", WORLD_SIZE="2")
    assert doctor.code == 1
    rows = doctor.failures()
    assert {*rows} == {"disk", "launcher", "layer on CPU"}
    assert "file/outputs" in rows["disk"]["found"]
    assert "Not a directory" in rows["disk"]["found"]
    assert rows["launcher"]["found"] == "WORLD_SIZE=2 without RANK"
    assert re.search(
        r"not finished within 0\.2 s; rank 0 was at: starting; rank 1 was at", rows["layer on CPU"]["found"]
    )
    assert all(row["fix"] for row in rows.values())


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path, "--json")
    ranks: list[int] = []
    while len(ranks) < 2 and doctor.process.poll() is None:
        ranks = [pid for pid in _session(doctor.process.pid) if b"spawn_main" in _command(pid)]
        time.sleep(0.01)
    os.kill(ranks[-1], signal.SIGKILL)
    doctor.end()
    assert doctor.code == 1
    (row,) = doctor.failures().values()
    assert re.search(r"rank [01] of 2 was killed by SIGKILL \(at: ", row["found"])
    assert "memory" in row["fix"]


def test_interrupted_it_leaves_no_rank(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path)
    while not any(b"spawn_main" in _command(pid) for pid in _session(doctor.process.pid)):
        assert doctor.process.poll() is None
        time.sleep(0.01)
    os.killpg(doctor.process.pid, signal.SIGINT)
    doctor.end()
    assert (doctor.code, doctor.out, doctor.err) == (130, "", "error: stopped by SIGINT\n")


def test_killed_it_leaves_no_rank_that_hangs(tmp_path: Path) -> None:
    code = "from tests.doctor import test_doctor as t; t.selftest.run(1000, t.hanging)"
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, env=env, start_new_session=True)
    try:
        while not any("asleep" in log.read_text(encoding="utf-8") for log in tmp_path.glob("*/rank-1.txt")):
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait(10)
        deadline = time.monotonic() + 15
        while _session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not _session(process.pid)
    finally:
        for pid in _session(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def unsynchronized(rank: int, place: Place, report_stage: ReportStage) -> selftest.Result:
    all_reduce.all_sum = lambda x, group, place: x
    return selftest.exercise(rank, place, report_stage)


def raising(rank: int, place: Place, report_stage: ReportStage) -> selftest.Result:
    report_stage("the sum")
    if rank == 1:
        raise ArithmeticError("does not\nadd up")
    return selftest.exercise(rank, place, report_stage)


def dying(rank: int, place: Place, report_stage: ReportStage) -> selftest.Result:
    report_stage("the end")
    if rank == 1:
        print("these were its last words", flush=True)
        os.abort()
    return selftest.exercise(rank, place, report_stage)


def hanging(rank: int, place: Place, report_stage: ReportStage) -> selftest.Result:
    report_stage("a long sleep")
    if rank == 1:
        print("asleep", flush=True)
        time.sleep(1000)
    return selftest.exercise(rank, place, report_stage)


def run(exercise: selftest.Exercise, *outputs: str, timeout: float = 120) -> list[Row]:
    """The rows of ``run_self_test.py``, which asserts that no rank is left."""
    command = (sys.executable, "-m", "tests.doctor.run_self_test", exercise.__name__, f"{timeout:g}", *outputs)
    call = run_command(REPO, *command, env=environment(), timeout=150)
    assert call.code == 0, call.err
    assert not call.left
    return [Row(**row) for row in json.loads(call.out)["rows"]]


@pytest.fixture(scope="module")
def results() -> list[selftest.Result]:
    """The results of two ranks that are well."""
    return on_ranks(CPU, selftest.exercise, 120)


def rows_of(results: list[selftest.Result], monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows of a self-test whose ranks have these results."""
    monkeypatch.setattr("syncbn.doctor.selftest_ranks.on_ranks", lambda place, exercise, timeout: results)
    return selftest.run()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_layer_that_does_not_synchronize(tmp_path: Path) -> None:
    rows = {row.check: row for row in run(unsynchronized, str(tmp_path))}
    uneven, empty, double = (rows[name] for name in LAYERS)
    assert uneven.status == double.status == Status.failed
    assert uneven.figures["y"] > 1e-3
    assert "running_mean, running_var: not the same on all ranks" in uneven.found
    assert re.match(r"y, dx, .*running_mean, running_var off by more than 1e-05; .*SYNCBN_NATIVE=0", uneven.fix)
    assert "off by more than 1e-11" in double.fix
    assert empty.status == Status.failed  # rank 1 has seen nothing
    assert rows["all-reduce on CPU"].status != Status.failed
    assert verdict([*rows.values()]).startswith(f"3 of {len(rows)} checks FAILED")


def test_buffers_that_differ_in_a_bit_only(results: list[selftest.Result], monkeypatch: pytest.MonkeyPatch) -> None:
    results = deepcopy(results)
    for rank, result in enumerate(results):
        for tensors in result.cases:
            tensors["running_var"] *= 1 + rank * (1e-14 if tensors["y"].dtype == torch.float64 else 2e-7)
    *layers, message = rows_of(results, monkeypatch)
    assert [row.status for row in layers] == [Status.failed] * 3
    assert message.status != Status.failed
    for row in layers:
        assert row.figures["running_var"] < row.figures["tolerance"]
        assert "running_var: not the same on all ranks" in row.found
        assert "off by" not in row.fix


def test_no_number_is_an_infinite_error(results: list[selftest.Result], monkeypatch: pytest.MonkeyPatch) -> None:
    results = deepcopy(results)
    for result in results:
        for tensors in result.cases:
            tensors["dx"][:1] = torch.nan
    *layers, _ = rows_of(results, monkeypatch)
    assert all(row.status == Status.failed and row.fix.startswith("dx off by more than") for row in layers)
    assert json.loads(to_json(layers))["rows"][0]["figures"]["dx"] is None


@pytest.mark.parametrize(
    ("exercise", "found"),
    [
        (raising, r"rank 1 of 2 raised ArithmeticError: does not add up \(at: the sum\)"),
        (dying, r"rank 1 of 2 was killed by SIGABRT \(at: the end\); its last line: these were its last words"),
    ],
)
def test_the_rank_that_failed_first_is_named(exercise: selftest.Exercise, found: str) -> None:
    (row,) = run(exercise)
    assert row.status == Status.failed
    assert re.search(found, row.found), row.found


def test_a_rank_that_hangs() -> None:
    start = time.monotonic()
    (row,) = run(hanging, timeout=15)
    assert time.monotonic() - start < 60
    assert row.status == Status.failed
    assert re.search(r"not finished within 1\d\.\d s; .*rank 1 was at: a long sleep", row.found), row.found


def test_ranks_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    before = set(multiprocessing.active_children())
    (row,) = selftest.run()
    assert set(multiprocessing.active_children()) == before
    assert row.status == Status.failed
    assert "TMPDIR" in row.fix


@pytest.mark.parametrize(
    ("gpus", "places"),
    [
        (0, [CPU]),
        (1, [CPU, Place("cuda", "nccl", 1)]),
        (2, [Place("cuda", "nccl", 2)]),
        (8, [Place("cuda", "nccl", 2)]),
    ],
)
def test_where_the_self_test_runs(monkeypatch: pytest.MonkeyPatch, gpus: int, places: list[Place]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert selftest.places() == places
    for place in places:
        assert all(len(case.shares) == place.ranks for case in selftest.cases(place))


def test_slow_messages_are_a_warning() -> None:
    assert selftest.latency(CPU, [300.0, 400.0, 500.0], "gloo").status == Status.ok
    assert selftest.latency(CPU, [11_000.0, 12_000.0, 13_000.0], "gloo").status == Status.warning


def test_a_check_that_raises_or_hangs_is_a_row() -> None:
    def broken() -> list[Row]:
        raise KeyError("what")

    (row,) = bounded("first", broken)
    assert (row.check, row.status) == ("first", Status.failed)
    assert "KeyError" in row.found
    (row,) = bounded("second", lambda: [ok("never", str(time.sleep(5)))], limit=0.1)
    assert (row.check, row.status) == ("second", Status.failed)
    assert bounded("third", lambda: [ok("third", "fine")]) == [ok("third", "fine")]


@pytest.mark.parametrize("width", [50, 80, 200])
def test_nothing_is_cropped(width: int) -> None:
    rows = [failed("disk [bold]", "/" + "q" * 300, "y " * 150), warning("z" * 40, "[red]", "w")]
    out = StringIO()
    show(rows, Console(file=out, width=width, highlight=False))
    text = out.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert [text.count(letter) for letter in "qyz"] == [300, 150, 40]
    assert "[bold]" in text
    assert "[red]" in text


@pytest.mark.parametrize(
    ("rows", "last"),
    [
        ([ok("a", "")], "all well"),
        ([ok("a", ""), warning("b", "", "c")], "all well, 1 warning"),
        ([ok("a", ""), failed("b", "", "c")], "1 of 2 checks FAILED"),
        (
            [failed("a", "", "c"), failed("b", "", "c"), *[warning("b", "", "c")] * 2],
            "2 of 4 checks FAILED, 2 warnings",
        ),
    ],
)
def test_the_last_line(rows: list[Row], last: str) -> None:
    assert verdict(rows) == last
    assert json.loads(to_json(rows))["ok"] is last.startswith("all well")
