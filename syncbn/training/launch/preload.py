"""The modules that a run's ranks need; the server that they are forked from imports them once."""

from omegaconf import DictConfig, OmegaConf

from syncbn import training
from syncbn.training.loggers.wandb_internals import IMPORTED_BY_INIT

RANK = ("syncbn.training.launch.rank", IMPORTED_BY_INIT)


def modules(cfg: DictConfig) -> list[str]:
    """The names of the modules, that of the data among them: ``Digits`` imports scikit-learn, which takes a second."""
    package, _, name = str(OmegaConf.select(cfg, "data._target_")).rpartition(".")
    home = training.HOME.get(name) if package == training.__name__ else None
    return [*RANK, *([f"{training.__name__}.{home}"] if home else [])]
