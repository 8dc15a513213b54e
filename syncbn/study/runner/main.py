"""What ``train.py`` calls for ``+study=NAME``. Imports little, as :mod:`syncbn.training.launch.main` does."""

from omegaconf import DictConfig

from syncbn.training.distributed import rank_processes, signals


def main(cfg: DictConfig) -> None:
    """Does the study's runs and writes its report; see :mod:`syncbn.study.runner.run_study`."""
    signals.end_at_once()
    rank_processes.start_server(
        "syncbn.training.launch.preload"
    )  # it imports what ranks need, while this process imports torch
    from syncbn.study.runner import run_study

    run_study.main(cfg)
