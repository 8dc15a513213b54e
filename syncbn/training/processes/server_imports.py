"""Imports, in the fork server, the modules that an environment variable names, so that ranks need not import them.

A module that cannot be imported is skipped. An exception would end the server here, and the rank that needs the module
reports it. ``launch.preload`` chooses the modules.
"""

import gc
import os
from contextlib import suppress
from importlib import import_module

VARIABLE = "SYNCBN_SERVER_IMPORTS"  # names of modules, separated by commas


def import_modules(names: list[str]) -> None:
    """Imports the modules and exempts all objects of this process from garbage collection.

    They live as long as the process. Otherwise the first full collection of each rank would traverse all of them, which
    takes 0.4 s and copies the memory that ranks share with the server (see :func:`gc.freeze`).
    """
    gc.disable()
    for name in names:
        with suppress(Exception):
            import_module(name)
    gc.freeze()
    gc.enable()


if modules := list(filter(None, os.environ.get(VARIABLE, "").split(","))):
    import_modules(modules)
