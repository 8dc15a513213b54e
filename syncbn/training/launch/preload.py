"""What the server that ranks are forked from imports, so that they need not.

An import that fails is left to the rank, which says so; here it would end the server.
"""

from contextlib import suppress
from importlib import import_module

from syncbn.training.loggers.wandb_internals import IMPORTED_BY_INIT

for name in ("syncbn.training.launch.rank", IMPORTED_BY_INIT):
    with suppress(Exception):
        import_module(name)
