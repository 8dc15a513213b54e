"""The undocumented parts of W&B are there, and mean what they did in W&B 0.31."""

import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import wandb

from syncbn.training.loggers import wandb_internals


@pytest.mark.parametrize("name", ["HandleAbandonedError", "MailboxClosedError"])
def test_wandb_has_the_error(name: str) -> None:
    from wandb.sdk import mailbox

    error = getattr(mailbox, name)
    assert error in wandb_internals.connection_errors()
    assert not issubclass(error, wandb.Error)


def test_wandb_has_the_module_that_init_imports() -> None:
    assert find_spec(wandb_internals.IMPORTED_BY_INIT) is not None


def test_the_log_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=tmp_path) as run:
        directory = Path(run.dir).parent
        run.log({"a": 1})
        run.log({"a": 2})
    wandb.teardown()  # its process writes the rest
    assert wandb_internals.log_of(directory).name == f"run-{run.id}.wandb"
    assert wandb_internals.has_records(directory)
    environment = os.environ | {"WANDB_MODE": "offline"}
    printed = subprocess.check_output(wandb_internals.inspect_command(directory), env=environment, encoding="utf-8")
    lines = [json.loads(line)["history"]["item"] for line in printed.splitlines() if '"type":"history"' in line]
    assert [(line[wandb_internals.NUMBER], line["a"]) for line in lines] == [(0, 1), (1, 2)]
    os.truncate(wandb_internals.log_of(directory), wandb_internals.HEADER)
    assert not wandb_internals.has_records(directory)


def test_a_log_that_cannot_be_read_has_no_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run-a.wandb").touch()
    assert wandb_internals.history(tmp_path) == []
    monkeypatch.setattr(wandb.util, "get_core_path", lambda: "/no/such/program")
    assert wandb_internals.history(tmp_path) == []
    monkeypatch.setattr(wandb.util, "get_core_path", raising)
    assert wandb_internals.history(tmp_path) == []
    monkeypatch.delattr(wandb.util, "get_core_path")
    assert wandb_internals.history(tmp_path) == []
    for line in ("no JSON", "{}", '{"history": []}'):
        monkeypatch.setattr(
            wandb_internals, "inspect_command", lambda _, line=line: ["echo", f'{line} "type":"history"']
        )
        assert wandb_internals.history(tmp_path) == []


def test_errors_that_wandb_has_moved_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk import mailbox

    monkeypatch.delattr(mailbox, "MailboxClosedError")
    assert wandb_internals.connection_errors() == (ConnectionError,)


def raising() -> None:
    raise wandb.errors.WandbCoreNotAvailableError("none for this platform")


def test_what_wandb_notes_about_an_upload(tmp_path: Path) -> None:
    assert not wandb_internals.was_synced(tmp_path)
    (tmp_path / "run-a.wandb.synced").touch()
    assert wandb_internals.was_synced(tmp_path)
    assert not wandb_internals.upload_failed(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "debug-internal.log").write_text('{"msg":"filestream: fatal error: gone"}\n', encoding="utf-8")
    assert wandb_internals.upload_failed(tmp_path)
