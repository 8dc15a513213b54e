"""What ``train.py`` calls for ``+study=NAME``. Imports little, as :mod:`syncbn.training.launch.main` does."""

from omegaconf import DictConfig

from syncbn.training.distributed import fork_server, signals
from syncbn.training.launch import preload


def main(cfg: DictConfig) -> None:
    """Does the study's runs and writes its report; see :mod:`syncbn.study.runner.run_study`."""
    signals.end_at_once()
    # It imports what ranks need, while this process imports torch.
    fork_server.start_server(*preload.modules(cfg))
    from syncbn.study.runner import run_study

    run_study.main(cfg)
