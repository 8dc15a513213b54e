"""Fixtures: reports that several tests check."""

from pathlib import Path

import pytest

from syncbn.study.claims.report import page
from syncbn.study.report import write
from tests.study.support import claim_results, comparisons


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of each comparison's report."""
    directories = {name: tmp_path_factory.mktemp("report") for name in comparisons.ALL}
    for name, directory in directories.items():
        assert write.write(comparisons.ALL[name](), directory) == directory / "report.html"
    return directories


@pytest.fixture(scope="session")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the page of the claims."""
    directory = tmp_path_factory.mktemp("claims")
    written = page.write(claim_results.all_nine(), claim_results.TITLE, claim_results.QUESTION, directory)
    assert written == directory / "report.html"
    return directory
