"""What ``train.py`` calls for ``+study=NAME``. Imports little, as :mod:`syncbn.training.launch` does."""

from omegaconf import DictConfig

from syncbn.training import ranks, stopping


def main(cfg: DictConfig) -> None:
    """Does the study's runs and writes its report; see :mod:`syncbn.study.studies`."""
    stopping.end_at_once()
    ranks.start_server("syncbn.training.preload")  # it imports what ranks need, while this process imports torch
    from syncbn.study import studies

    studies.main(cfg)
