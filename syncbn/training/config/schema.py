"""The types of settings for Hydra. Imports no torch: Hydra composes the settings before anything else."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

GROUPS = ("data", "norm", "trainer")  # groups that the settings of every run have


class WandbMode(StrEnum):
    """The modes of W&B."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class WandbConfig:
    """The settings of ``conf/logger/wandb.yaml``, which has no types: another logger could not be merged into it."""

    name: str = "wandb"
    mode: WandbMode = WandbMode.offline
    project: str = "syncbn"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    init_timeout: float = 60
    finish_timeout: float = 60
    pictures: bool = True
    log_model: Any = False


@dataclass
class TensorBoardConfig:
    """The settings of ``conf/logger/tensorboard.yaml``."""

    pictures: bool = True


@dataclass
class MLflowConfig:
    """The settings of ``conf/logger/mlflow.yaml``."""

    tracking_uri: str = "sqlite:///outputs/mlflow.db"
    experiment: str = "syncbn"
    group: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    pictures: bool = True
    log_model: Any = False


@dataclass
class RunConfig:
    """The types of ``run`` in ``conf/config.yaml``."""

    id: str | None = None


@dataclass
class ResumeConfig:
    """The types of ``resume`` in ``conf/config.yaml``."""

    every_n_steps: int | None = None
    every_n_minutes: float | None = 10
    keep: int = 2


@dataclass
class TimeoutsConfig:
    """The types of ``timeouts`` in ``conf/config.yaml``, in seconds."""

    collective: float = 600
    stop: float = 120


@dataclass
class AveragingConfig:
    """The types of ``averaging`` in ``conf/config.yaml``."""

    ema: float | None = None
    warmup: bool = False
    every_n_steps: int = 1
    swa_from: float | None = None
    swa_lr: float | None = None
    bn_batches: int | None = None


@dataclass
class EarlyStoppingConfig:
    """The types of ``early_stopping`` in ``conf/config.yaml``."""

    patience: int | None = None
    min_delta: float = 0.0
    mode: str | None = None


@dataclass
class FindLRConfig:
    """The types of ``find_lr`` in ``conf/config.yaml``."""

    min: float = 1e-6
    max: float = 10.0
    steps: int = 100


@dataclass
class DDPConfig:
    """The types of ``ddp`` in ``conf/config.yaml``."""

    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = False
    bucket_cap_mb: float | None = None
    comm_hook: str | None = None
    comm_wrapper: str | None = None
    powersgd_rank: int = 1
    powersgd_start: int = 1000


@dataclass
class ClusterConfig:
    """The types of ``conf/cluster``."""

    name: str = "local"
    requeue: bool = False


@dataclass
class Config:
    """The types of ``conf/config.yaml``. The settings within most groups have no types here."""

    data: Any = MISSING
    model: Any = MISSING
    norm: Any = MISSING
    module: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    callbacks: Any = None
    metrics: Any = None
    adapt: Any = None
    corruptions: Any = None
    augment: Any = None
    mix: Any = None
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    ddp: DDPConfig = field(default_factory=DDPConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    find_lr: FindLRConfig = field(default_factory=FindLRConfig)
    cluster: Any = MISSING
    ckpt_path: str | None = None
    init_from: str | None = None
    freeze: Any = None
    freeze_norm: bool = True
    channels_last: bool = False
    compile: bool = False
    compile_mode: str | None = None
    checkpoint_activations: Any = None
    plots: bool = True
    trust: bool = False
    ckpt_restore: str | None = None
    mode: str = "train"
    objective: str | None = None
    test: bool = True
    simulate: int | None = None
    precise_batches: int = 0
    fit: bool = False
    target: float | None = None
    study: Any = None


def register() -> None:
    """Registers the types with Hydra, under the names that the files in ``conf/`` use."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="logger", name="schema_wandb", node=WandbConfig)
    store.store(group="cluster", name="schema_cluster", node=ClusterConfig)
