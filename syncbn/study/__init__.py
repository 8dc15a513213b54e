"""Reads finished runs and compares them: pairs, statistics, plots, a report. The top floor.

Bottom up: ``runs`` (what a run directory says), ``pairing`` (which runs belong together), ``effects`` (the statistics
of pairs), ``comparison`` (all that follows, as tables), ``terminal``, ``plots`` and ``report`` (what is shown of it).
"""

from omegaconf import DictConfig

from syncbn.training import ranks


def main(cfg: DictConfig) -> None:
    """What ``train.py`` calls for ``+study=NAME``; see :mod:`syncbn.study.studies`."""
    ranks.start_server("syncbn.training.preload")  # it imports what ranks need, while this process imports torch
    from syncbn.study import studies

    studies.main(cfg)
