"""Checks the sweeper of a search before it starts, silences log lines that repeat ours, and reports the trials."""

import logging
import os
import sys
from importlib import import_module
from typing import Any

from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf

from syncbn.training.errors import SettingError
from syncbn.training.search import objective

PLUGIN = "hydra_plugins.hydra_optuna_sweeper"


class FailedJob(JobReturn):
    """The result of a failed job. Hydra's own prints the overrides whenever the sweeper asks for the value."""

    @property
    def return_value(self) -> Any:
        """Raises the error of the job."""
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def check(config: DictConfig) -> None:
    """Refuses a search that cannot work; to be called before Hydra imports the sweeper.

    Raises:
        SettingError: it is not known what is better, the sweeper would search the worst or try nothing, or its database
            cannot be used.
    """
    if not str(OmegaConf.select(config, "hydra.sweeper._target_")).startswith(f"{PLUGIN}."):
        return
    _check_direction(config)
    for name in ("n_trials", "n_jobs"):
        number = OmegaConf.select(config, f"hydra.sweeper.{name}")
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SettingError(f"hydra.sweeper.{name}", number, "use a whole number, 1 or more")
    # The sweeper logs each failed trial and the best one, which our table shows; alembic logs each of its plugins.
    os.environ.setdefault(
        "SQLALCHEMY_SILENCE_UBER_WARNING", "1"
    )  # Optuna 2.10 needs SQLAlchemy 1.4, which warns of 2.0
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger(f"{PLUGIN}._impl").setLevel(logging.ERROR)
    _check_storage(OmegaConf.select(config, "hydra.sweeper.storage"))


def _check_storage(storage: Any) -> None:
    if storage is None:
        return
    try:
        import_module("optuna.storages").get_storage(str(storage))
    except ImportError:  # the sweeper, or the driver of another database; Hydra reports it
        return
    except Exception as error:  # of SQLAlchemy, sqlite3 or redis, which have no common class
        reason = str(error).partition("\n")[0]
        hint = f"this database cannot be used ({reason}); use sqlite:///search.db, or another address that exists"
        raise SettingError("hydra.sweeper.storage", storage, hint) from error


def _check_direction(config: DictConfig) -> None:
    """Refuses to search the worst value: Optuna's sweeper minimizes by default."""
    given = OmegaConf.select(config, "hydra.sweeper.direction")
    if OmegaConf.is_list(given):
        raise SettingError("hydra.sweeper.direction", given, "a run has one objective; use maximize or minimize")
    monitor, mode = (OmegaConf.select(config, f"callbacks.checkpoint.{name}") for name in ("monitor", "mode"))
    wanted, shown = objective.direction(config.objective, monitor, mode), config.objective or monitor
    named = str(given).rpartition(".")[2]
    if named not in ("maximize", "minimize"):
        hint = f"it does not follow from objective={shown}; use maximize or minimize"
        raise SettingError("hydra.sweeper.direction", hint=hint)
    if wanted not in ("unknown", named):
        hint = f"that is the worst {shown}; use hydra.sweeper.direction={wanted}, or hydra/sweeper=search"
        raise SettingError("hydra.sweeper.direction", named, hint)


def silence() -> None:
    """Silences Optuna's own log lines, once it has been imported."""
    if "optuna" in sys.modules:
        sys.modules["optuna"].logging.set_verbosity(logging.WARNING)


def is_fruitless(settings: DictConfig, completed: int) -> bool:
    """Whether a search by Optuna has no trial with a value, in this command or in its database."""
    if completed or not str(settings.get("_target_")).startswith(f"{PLUGIN}."):
        return False
    name, storage = settings.get("study_name"), settings.get("storage")
    if name is None or storage is None:
        return True
    optuna = sys.modules["optuna"]
    trials = optuna.load_study(study_name=str(name), storage=str(storage)).get_trials(deepcopy=False)
    return not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials)


def is_better(value: float, than: float, direction: Any) -> bool:
    """Whether an objective is better than another one."""
    return value < than if str(direction).lower().endswith("minimize") else value > than
