"""Lists the modules that the ranks of a run need, which the fork server imports once for all of them."""

from omegaconf import DictConfig, OmegaConf

from syncbn import training
from syncbn.training.loggers.wandb_internals import IMPORTED_BY_INIT

LOGGERS = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard.backend.event_processing.event_accumulator"),
    "mlflow": ("mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store"),
}
RANK = ("syncbn.training.launch.rank", IMPORTED_BY_INIT)


def modules(cfg: DictConfig) -> list[str]:
    """The names of the modules, including the module of the data set.

    ``Digits`` imports scikit-learn, which takes a second in every rank if the fork server has not imported it.
    """
    chosen = [name for name in LOGGERS if OmegaConf.select(cfg, f"logger.{name}") is not None]
    loggers = [module for name in chosen for module in LOGGERS[name]]
    package, _, name = str(OmegaConf.select(cfg, "data._target_")).rpartition(".")
    home = training.HOME.get(name) if package == training.__name__ else None
    return [*RANK, *loggers, *([f"{training.__name__}.{home}"] if home else [])]
