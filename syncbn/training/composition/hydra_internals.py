"""The private part of Hydra that the composition needs; no other module uses it.

It was read in Hydra 1.3.8. A test of ``tests/training/composition`` fails when a later Hydra has moved it.
"""

from argparse import ArgumentParser

from hydra._internal.utils import get_args_parser


def argument_parser() -> ArgumentParser:
    """The parser of Hydra's own options (``-m``, ``--config-dir``, ``--cfg``); ``hydra.main`` makes one too."""
    return get_args_parser()
