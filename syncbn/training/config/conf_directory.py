"""Finds the directory ``conf``: the wheel has it in the package, a checkout beside the package."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2]


def conf_directory() -> Path:
    """The directory with the settings that are built in."""
    inside = PACKAGE / "conf"
    return inside if inside.is_dir() else PACKAGE.parent / "conf"
