"""Writes a small project: copies the files of ``template/`` and gives the package the name of the directory."""

import keyword
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from syncbn.training.atomic_write import replacing
from syncbn.training.errors import SettingError
from syncbn.training.os_errors import explain

TEMPLATE = Path(__file__).parent / "template"
NAME = "my_project"  # of the template's package


def create(directory: Path) -> list[str]:
    """Writes the project.

    Args:
        directory: a new or an empty directory.

    Returns:
        Lines that tell the user what to do next.

    Raises:
        SettingError: the directory has files, or cannot be written.
    """
    try:
        if directory.is_dir() and any(directory.iterdir()):
            raise SettingError("directory", directory, "it is not empty; use a new directory")
        package = package_name(directory.resolve().name)
        for source in sorted(TEMPLATE.rglob("*")):
            if source.is_file() and "__pycache__" not in source.parts:
                _copy(source, directory / _renamed(str(source.relative_to(TEMPLATE)), package), package)
    except OSError as error:
        raise SettingError("directory", directory, explain(error, directory)) from error
    return [
        f"{directory}: a network, data, settings and a test. Train it with:",
        f"  cd {directory} && syncbn train --config-dir conf experiment=first",
    ]


def _copy(source: Path, target: Path, package: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as draft:
        draft.write_text(_renamed(source.read_text(encoding="utf-8"), package), encoding="utf-8")


def _renamed(text: str, package: str) -> str:
    return text.replace(NAME, package)


def package_name(directory: str) -> str:
    """A name for the package of a project in a directory of this name: an identifier that no module has."""
    name = re.sub(r"\W+", "_", directory, flags=re.ASCII).strip("_").lower() or "project"
    if name[0].isdigit():
        name = f"project_{name}"
    taken = keyword.iskeyword(name) or name in sys.stdlib_module_names or name in ("conf", "tests", "syncbn")
    return f"{name}_project" if taken or find_spec(name) is not None else name
