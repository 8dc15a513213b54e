"""Imports go down: between floors, between folders, and never in a circle (``tool.importlinter`` in pyproject.toml)."""

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

from tests.training.support.train_command import REPO


def test_no_import_goes_up_and_none_goes_round() -> None:
    assert lint_imports(config_filename=str(REPO / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS
