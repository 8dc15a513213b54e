"""Tests ``+study=claims`` with the smallest budget: all nine claims, from runs to the page."""

from pathlib import Path

import pandas as pd
import pytest

from syncbn.study.claims.verdict import FAILS, HOLDS, NOT_ASKED, NOT_RUN
from tests.study.claims.test_docs_match_rules import CLAIMS
from tests.training.support.train_command import train


@pytest.mark.timeout(600)  # two minutes on an idle machine
def test_nine_claims_in_two_minutes(tmp_path: Path) -> None:
    run = train(tmp_path, "+study=claims", "study.budget=smoke", "study.directory=s", "logger=csv", timeout=570)
    assert run.code == 0, run.err
    assert not run.left
    tables = {
        path.stem: pd.read_csv(path, na_values=[], keep_default_na=False)
        for path in (tmp_path / "s/report/tables").glob("*.csv")
    }
    verdicts, cases, plots = (tables[name] for name in ("verdicts", "cases", "plots"))
    assert list(verdicts.study.unique()) == CLAIMS
    assert (verdicts.finished == verdicts.runs).all()
    known = [word.startswith((HOLDS, FAILS, NOT_RUN, "not decided")) or word == NOT_ASKED for word in verdicts.verdict]
    assert all(known), list(verdicts.verdict)
    asked = cases[cases.n.astype(int) == 2]  # cases that this budget omits have no pairs
    assert {*asked.study} == {*CLAIMS}
    assert (asked.effect != "").all()
    assert {*plots.study} == {*CLAIMS}
    page = (tmp_path / "s/report/report.html").read_text(encoding="utf-8")
    for number, name in enumerate(CLAIMS, start=1):
        assert any(line.startswith(f"{number} ") for line in run.out.splitlines()), name
    assert page.count("<svg") == len(plots["plot"].unique())
