"""Fixtures: the published page on the nine claims, made again from its tables."""

import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from syncbn.study.claims.report.remake import remake

PUBLISHED = Path(__file__).parents[3] / "docs/results/claims"


@pytest.fixture(scope="package")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tables of ``docs/results/claims``, and the page that was made from them."""
    directory = tmp_path_factory.mktemp("published")
    shutil.copytree(PUBLISHED / "tables", directory / "tables")
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig  # PNG files take most of the time, and no test of this page needs them
        patch.setattr(
            Figure, "savefig", lambda self, path, **given: path.suffix == ".svg" and save(self, path, **given)
        )
        assert remake(directory) == directory / "report.html"
    return directory
