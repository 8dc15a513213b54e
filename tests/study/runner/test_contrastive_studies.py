"""Tests ``+study=leak`` and ``+study=moco`` at their smoke budgets, as a user calls them."""

import html
import json
from pathlib import Path

import pandas as pd
import pytest

from tests.training.support.train_command import train


@pytest.mark.parametrize(("study", "part"), [("leak", "views/weak"), ("moco", "keys/digits")])
def test_a_whole_study(tmp_path: Path, study: str, part: str) -> None:
    run = train(tmp_path, f"+study={study}", "study.budget=smoke", "study.seeds=1", "study.directory=s", "logger=csv")
    assert run.code == 0, run.err
    assert not run.left
    leak = {
        side: json.loads((tmp_path / "s" / part / side / "0/result.json").read_text(encoding="utf-8"))
        for side in ("local", "sync")
    }
    # Zero by construction; per-device statistics make a difference, of either sign in a network that is hardly trained.
    assert leak["sync"]["leak"]["leak/difference"] == 0
    assert leak["local"]["leak"]["leak/difference"] != 0
    page = html.unescape((tmp_path / "s/report/report.html").read_text(encoding="utf-8"))
    assert "per-device statistics reveal" in page
    tables = tmp_path / "s" / "report" / f"{part.split('/')[0]}-test-acc_probe" / "tables"
    assert set(pd.read_csv(tables / "means.csv")["side"]) == {"sync", "local"}
    assert "test error of a linear probe" in page
