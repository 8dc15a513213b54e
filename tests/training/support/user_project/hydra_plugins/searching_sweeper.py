"""A sweeper that uses what jobs return, as Optuna's does, and goes on where one has failed."""

import json
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class SearchingSweeper(Sweeper):
    """Launches the jobs of ``batches``, a list of lists of overrides, and writes what they returned to ``path``."""

    def __init__(self, batches, path) -> None:
        self.batches, self.path = batches, Path(path)

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments) -> None:
        answers, begun = [], 0
        for batch in self.batches:
            for job in self.launcher.launch([[*arguments, each] for each in batch], begun):
                begun += 1
                try:
                    answers.append(job.return_value)
                except Exception as error:  # the test asserts the error of any class that a job raises
                    answers.append([type(error).__name__, str(error)])
        self.path.write_text(json.dumps(answers), encoding="utf-8")


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="searching",
    node={"_target_": f"{__name__}.{SearchingSweeper.__name__}", "batches": [], "path": ""},
    provider="tests",
)
