"""Reports that several tests look at."""

from pathlib import Path

import pytest

from syncbn.study import report
from tests.study import comparisons


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of each comparison's report."""
    directories = {name: tmp_path_factory.mktemp("report") for name in comparisons.ALL}
    for name, directory in directories.items():
        assert report.write(comparisons.ALL[name](), directory) == directory / "report.html"
    return directories
