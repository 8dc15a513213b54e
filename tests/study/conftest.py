"""Reports that several tests look at."""

from pathlib import Path

import pytest

from syncbn.study import report
from syncbn.study.claims import page
from tests.study import comparisons, findings


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of each comparison's report."""
    directories = {name: tmp_path_factory.mktemp("report") for name in comparisons.ALL}
    for name, directory in directories.items():
        assert report.write(comparisons.ALL[name](), directory) == directory / "report.html"
    return directories


@pytest.fixture(scope="session")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the page of the claims."""
    directory = tmp_path_factory.mktemp("claims")
    written = page.write(findings.all_nine(), findings.TITLE, findings.QUESTION, directory)
    assert written == directory / "report.html"
    return directory
