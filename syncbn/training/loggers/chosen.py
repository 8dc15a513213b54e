"""Which loggers the settings choose, and whether they are installed. Imports none of them.

``logger=[wandb,tensorboard]`` merges the files of both. The settings of W&B stand in the group ``logger`` itself, those
of another logger in a group of its name, and a group with a ``_target_`` is a custom logger.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from syncbn.training.config.schema import MLflowConfig, TensorBoardConfig
from syncbn.training.errors import SettingError

WANDB = "wandb"
LOCAL = "sqlite:///"  # how the address of an MLflow store begins that is a file here
BUILT_IN = {"tensorboard": TensorBoardConfig, "mlflow": MLflowConfig}
PACKAGES = {  # the modules of each, with the command that installs them
    "tensorboard": (("tensorboard",), "pip install tensorboard"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), "pip install mlflow-skinny sqlalchemy alembic"),
}


def names(group: Mapping[str, Any]) -> list[str]:
    """The loggers besides ``metrics.csv``, by the names of their settings."""
    found = [str(name) for name in group if name in BUILT_IN and group[name] is not None]
    return [*([WANDB] if uses_wandb(group) else []), *found, *custom(group)]


def uses_wandb(group: Mapping[str, Any]) -> bool:
    """Whether metrics go to W&B too."""
    return group.get("name") == WANDB and str(group.get("mode", "offline")) != "disabled"


def custom(group: Mapping[str, Any]) -> list[str]:
    """The names of the loggers that a ``_target_`` names."""
    return [str(name) for name, each in group.items() if isinstance(each, Mapping) and each.get("_target_")]


def check(group: Mapping[str, Any]) -> None:
    """Refuses a logger whose package is not installed.

    Raises:
        SettingError: the hint has the command that installs it.
    """
    for name in names(group):
        modules, command = PACKAGES.get(name, ((), ""))
        if name == "mlflow" and not str(group[name].tracking_uri).startswith("sqlite"):
            modules = modules[:1]  # a server has the database
        lacking = [each for each in modules if find_spec(each) is None]
        if lacking:
            raise SettingError("logger", name, f"there is no package {lacking[0]} here; {command}")
