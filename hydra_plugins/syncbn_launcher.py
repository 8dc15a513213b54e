"""The Hydra launcher plugin for sweeps, ``hydra/launcher=syncbn``.

Hydra finds plugins in the package ``hydra_plugins`` and imports this module at every start, so it imports little.
"""

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SyncbnLauncher(Launcher):
    """Runs the jobs of a sweep with :func:`syncbn.training.launch.sweep.run`."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from syncbn.training.search import sweeper

        sweeper.silence()
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from syncbn.training.launch import sweep

        return sweep.run(self, job_overrides, initial_job_idx)


ConfigStore.instance().store(
    group="hydra/launcher",
    name="syncbn",
    node={"_target_": f"{__name__}.{SyncbnLauncher.__name__}"},
    provider="syncbn",
)
