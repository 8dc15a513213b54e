"""Imports go down: between floors, between folders, and never in a circle (``tool.importlinter`` in pyproject.toml)."""

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from tests.conftest import LONGEST
from tests.training.support.train_command import REPO


def test_no_import_goes_up_and_none_goes_round() -> None:
    assert lint_imports(config_filename=str(REPO / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


def test_the_files_that_begin_first_are_there() -> None:
    assert set(LONGEST) <= {path.name for path in (REPO / "tests").rglob("test_*.py")}
